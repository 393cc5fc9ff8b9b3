"""Declare the options of `kto-train` and their defaults, which are defined nowhere else."""

import contextlib
import json
import math
from dataclasses import dataclass
from pathlib import Path

from offline_kto.kto_core.errors import ConfigError, shown
from offline_kto.kto_core.locations import Location
from offline_kto.kto_core.options import AUTO, OTHER_NAMES_OF_TYPES, check_options, flag, folder_or_name, option
from offline_kto.train.loss_traits import LOSS_OF_OPTION, LOSSES, PAIRED_LOSSES

METRICS = ("eval/loss", "eval/accuracy", "eval/rewards/margins")
DTYPES = (AUTO, "float32", "bfloat16")
MEMORIES = ("full", "lean", "host")
SAVE_DTYPES = (AUTO, "float32", "bfloat16", "float16")
REDUCE_DTYPES = ("float32", "bfloat16")
VERIFICATIONS = ("full", "changed")
SCHEDULERS = ("constant", "linear", "cosine", "polynomial", "inverse_sqrt", "warmup_stable_decay")

# Options that an evaluation (`evaluate_only`) accepts; all others come from the run.
OF_EVALUATION = frozenset(
    [
        "allow_different_policy",
        "attention",
        "cache",
        "device",
        "dtype",
        "evaluate_only",
        "max_tokens",
        "samples",
        "trust_remote_code",
        "verify",
    ]
)

# What --learning-rate auto is. Adapters start at zero and take about ten times the rate of full fine-tuning.
USUAL_RATE, USUAL_RATE_OF_LORA = 1e-6, 2e-5

# Held-out prompts that are sampled unless --samples says otherwise.
USUAL_SAMPLES = 8

_UPDATES = 2**31 - 1  # more than any run makes
_MOST_WEIGHT = 1e9  # of an objective; only ratios of weights matter
_SEEDS = 2**32 - 1  # numpy's


@dataclass(frozen=True)
class TrainConfig:
    """The options of `kto-train`."""

    cache: Location = option(
        Path(""), "Reference cache made by kto-precompute: a folder, or its URL (s3://, gs://, hf://).", metavar="DIR"
    )
    verify: str = option(
        "full",
        "How the cache is verified: full reads every byte; changed reads only files that changed since they were verified here, which "
        "does not notice a disk that damages a file by itself.",
        choices=VERIFICATIONS,
    )
    out: Path | None = option(None, "Run folder.  [default: runs/ and the time]", metavar="DIR")
    model: str | None = option(
        None,
        "Policy to start from.  [default: the model the cache was scored with]",
        metavar="MODEL",
        may_be_path=folder_or_name,
    )
    loss: str = option(
        "kto",
        "Loss; humanline is KTO with limited token log-ratios, ppo_clip offline PPO with rewards of +1 and -1; "
        f"{', '.join(PAIRED_LOSSES)} need pairs.",
        choices=LOSSES,
    )
    beta: float = option(0.1, "How fast the value of an outcome saturates, per nat of log-ratio.")
    desirable_weight: float | str = option(1.0, "Weight of desirable rows; auto balances the classes.")
    undesirable_weight: float | str = option(1.0, "Weight of undesirable rows; auto balances the classes.")
    objective: str | None = option(
        None,
        "Weights of the objectives that the feedback judges, such as helpful=1,harmless=0.5; others are ignored.  [default: the "
        "masses of the rows, in which all objectives count alike]",
        metavar="NAME=WEIGHT,...",
        table=True,
    )
    humanline_low: float = option(-1.0, "Least log-ratio of a token under --loss humanline, nats.", finite=False)
    humanline_high: float = option(1.5, "Greatest log-ratio of a token under --loss humanline, nats.", finite=False)
    clip_epsilon: float = option(
        0.2, "How far a token's probability ratio may be from 1 under --loss ppo_clip; beyond, it gets no gradient."
    )
    label_smoothing: float = option(
        0.1, "Share of pairs that are taken to be labelled the wrong way round, under --loss robust."
    )
    simpo_gamma: float = option(
        0.5, "Margin that a pair should have under --loss simpo, on the scale of beta times log-probs per token."
    )
    sft_weight: float = option(
        0.0,
        "Weight of the negative log-likelihood of desirable completions, mean over their tokens, which is added to any loss.",
    )
    learning_rate: float | str = option(
        AUTO,
        f"Peak learning rate; auto is {USUAL_RATE:g} for all weights and {USUAL_RATE_OF_LORA:g} for LoRA. 0 trains nothing, to check a "
        "pipeline.",
        most=1,
    )
    epochs: float = option(1.0, "Passes over the training rows.", most=1_000_000)
    max_steps: int | None = option(None, "Stop after N updates.", metavar="N")
    batch_size: int = option(32, "Rows in one update, over all devices.")
    max_tokens: int | str = option(
        AUTO,
        "Tokens in one forward and backward pass on one device: limits memory, and changes results only by rounding. auto "
        "measures what fits on a GPU and is 1024 on a CPU.",
    )
    max_length: int | None = option(None, "Shorten rows to N tokens.  [default: as cached]", metavar="N")
    scheduler: str = option("constant", "Learning-rate schedule.", choices=SCHEDULERS)
    warmup: float = option(
        0.0, "Warm-up: below 1 a fraction of all updates, otherwise a number of updates.", most=_UPDATES
    )
    weight_decay: float = option(0.0, "Decoupled weight decay.")
    seed: int = option(0, "Seed of the row order, the hold-out and LoRA's initialization.", most=_SEEDS)
    shuffle: bool = option(True, "Shuffle rows in every epoch.", off="--no-shuffle")
    balance: bool = option(
        True,
        "Keep both classes in every batch, at the data's ratio. Without --shuffle rows keep the file's order.",
        off="--no-balance",
    )
    dtype: str = option(
        AUTO,
        "Precision; auto is bfloat16 on a GPU and float32 on a CPU. bf16 and fp32 are understood.",
        choices=DTYPES,
        synonyms=OTHER_NAMES_OF_TYPES,
    )
    device: str = option(
        AUTO,
        "Device.",
        choices=(AUTO, "cpu", "cuda"),
        hint="To train on one of several GPUs, set CUDA_VISIBLE_DEVICES to its number.",
    )
    reduce_dtype: str = option(
        "float32",
        "Type in which gradients are added over several GPUs; bfloat16 halves the traffic and rounds each addition.",
        choices=REDUCE_DTYPES,
        synonyms=OTHER_NAMES_OF_TYPES,
    )
    attention: str = option(
        AUTO,
        "Attention: auto, sdpa, flash, flex, varlen, or a name in transformers or on the hub; changes results only by "
        "rounding. auto is flash attention on a GPU where it is installed, or else varlen, or else the model's own.",
        metavar="auto|sdpa|flash|NAME",
    )
    memory: str = option(
        "full",
        "What training keeps of each weight: full has float32 weights, gradients and AdamW moments (16 bytes, 18 under "
        "bfloat16); lean has bfloat16 weights, rounded up or down at random, and 8-bit moments (6 bytes); host has bfloat16 weights and "
        "gradients on the device (4 bytes), float32 weights and moments on the host (12 bytes).",
        choices=MEMORIES,
    )
    gradient_checkpointing: bool | None = option(
        None,
        "Recompute activations in the backward pass.  [default: if --max-tokens auto finds room for fewer than 4,096 tokens]",
        off="--no-gradient-checkpointing",
    )
    lora_rank: int = option(0, "Rank of LoRA adapters; 0 trains all weights.", most=2**14)
    lora_alpha: float | None = option(None, "Scale of LoRA adapters.  [default: twice the rank]")
    lora_targets: str = option("all-linear", "Layers that get adapters: names separated by commas.")
    eval_fraction: float = option(0.0, "Share of prompts held out for evaluation.")
    eval_cache: Location | None = option(None, "Reference cache of held-out rows.", metavar="DIR")
    eval_steps: int | None = option(None, "Evaluate every N updates.  [default: once per epoch]", metavar="N")
    eval_seed: int | None = option(None, "Seed of the hold-out.  [default: --seed]", metavar="N", most=_SEEDS)
    metric: str = option(
        "eval/loss", "Held-out value that chooses the best evaluation, whose checkpoint is kept.", choices=METRICS
    )
    keep: str | None = option(
        None,
        "Model that a run with held-out rows ends with: that of the best evaluation by --metric, or the last one.  [default: best]",
        choices=("best", "last"),
    )
    samples: int | None = option(
        None,
        "Held-out prompts that the model completes greedily before and after training, into samples.jsonl; 0 for none.  [default: "
        f"{USUAL_SAMPLES} with held-out rows]",
        metavar="N",
    )
    samples_at: str = option(
        "ends",
        "When samples are made: at both ends of training, or at its evaluations as well.",
        choices=("ends", "evaluations"),
    )
    early_stopping: int | None = option(
        None,
        "Stop after N evaluations in a row without a better --metric than any before, the untrained model's included.",
        metavar="N",
    )
    save_dtype: str = option(
        AUTO,
        "Type of the saved weights; auto keeps what was trained (float32, or bfloat16 with --memory lean or host). In bfloat16 and "
        "float16 the model has half the size, and a weight that training moved by less than about 0.2 % (0.02 %) falls back "
        "to its old value.",
        choices=SAVE_DTYPES,
        synonyms=OTHER_NAMES_OF_TYPES,
    )
    save_steps: int = option(500, "Write a checkpoint every N updates; 0 for none.")
    logging_steps: int = option(1, "Log metrics every N updates.")
    report_to: str = option("none", "Trackers: tensorboard, wandb, trackio, mlflow ..., separated by commas.")
    resume: bool = option(
        False,
        "Resume from the last checkpoint in --out; options that are not given are those that its run was started with.",
        yaml=False,
    )
    evaluate_only: Path | None = option(
        None,
        "Do not train: evaluate a finished run on its held-out rows, or on the rows of another --cache that it was not trained on.",
        metavar="RUN",
        yaml=False,
    )
    push_to_hub: str | None = option(
        None,
        "Upload the finished run to this repository on the hub: model, tokenizer, model card and report. It is created if it "
        "does not exist.",
        metavar="NAME",
    )
    dry_run: bool = option(
        False, "Stop after the plan: check cache, policy and options; train and write nothing.", yaml=False
    )
    plan_memory: str | None = option(
        None,
        "Do not train: print the memory that training a model takes, by recipe, from its config.json alone.",
        metavar="MODEL",
        yaml=False,
    )
    allow_different_policy: bool = option(False, "Train a policy that is not the cached reference.")
    trust_remote_code: bool = option(False, "Run code that comes with the model.")
    training: dict[str, object] = option(dict, "YAML only: passed to transformers.TrainingArguments.")

    def __post_init__(self) -> None:
        check_options(self)
        if isinstance(self.max_tokens, str):
            if self.max_tokens != AUTO:
                raise ConfigError(f"--max-tokens must be a whole number or auto, got {self.max_tokens!r}.")
        else:
            self._at_least(max_tokens=1)
        self._at_least(batch_size=1, max_length=2, max_steps=1, eval_steps=1, logging_steps=1, early_stopping=1)
        self._at_least(lora_rank=0, save_steps=0, warmup=0, weight_decay=0, seed=0, eval_seed=0, samples=0)
        if self.peak_rate < 0:
            raise ConfigError(f"--learning-rate must be at least 0, got {self.peak_rate:g}.")
        self._at_least(simpo_gamma=0, sft_weight=0)
        if self.desirable_weight == 0 and self.undesirable_weight == 0:
            raise ConfigError("--desirable-weight and --undesirable-weight are both 0, so there is nothing to learn.")
        for name in ("desirable_weight", "undesirable_weight", "learning_rate"):
            value = getattr(self, name)
            if isinstance(value, str) and value != AUTO:
                raise ConfigError(f"{flag(name)} must be a number or auto, got {value!r}.")
        for name, value in (
            ("beta", self.beta),
            ("epochs", self.epochs),
            ("lora_alpha", self.lora_alpha),
        ):
            if value is not None and not 0 < value < float("inf"):
                raise ConfigError(f"{flag(name)} must be above 0, got {value}.")
        for name in ("desirable_weight", "undesirable_weight"):
            value = getattr(self, name)
            if not isinstance(value, str) and not 0 <= value < float("inf"):
                raise ConfigError(f"{flag(name)} must not be negative, got {value}.")
        self.objective_weights  # noqa: B018 - checks the option
        if self.memory != "full" and self.evaluate_only is None:
            self._check_memory()
        if not self.humanline_low <= 0 <= self.humanline_high or self.humanline_low == self.humanline_high:
            raise ConfigError(
                f"--humanline-low {self.humanline_low:g} and --humanline-high {self.humanline_high:g} must have 0 between "
                "them, because every token's log-ratio starts at 0."
            )
        self._check_own_options()
        if self.loss in PAIRED_LOSSES:
            self._check_pairs()
        if not 0 <= self.eval_fraction < 1:
            raise ConfigError(f"--eval-fraction must be at least 0 and below 1, got {self.eval_fraction}.")
        if self.eval_fraction and self.eval_cache:
            raise ConfigError("--eval-fraction and --eval-cache both name held-out rows; give one of them.")
        if not self.holds_out and self.evaluate_only is None:
            for name in ("early_stopping", "eval_steps", "metric", "samples", "samples_at"):
                if (getattr(self, name) or None) != getattr(type(self), name):
                    raise ConfigError(f"{flag(name)} needs held-out rows: give --eval-fraction 0.1 or --eval-cache.")
        if self.samples == 0 and self.samples_at != "ends":
            raise ConfigError(f"--samples-at {self.samples_at} has no effect with --samples 0. Leave one of them out.")
        if self.resume and self.out is None:
            raise ConfigError("--resume needs --out, the folder of the run to resume.")

    @property
    def peak_rate(self) -> float:
        """The peak learning rate, with `auto` resolved for the weights that are trained."""
        if isinstance(self.learning_rate, str):
            return USUAL_RATE_OF_LORA if self.lora_rank else USUAL_RATE
        return self.learning_rate

    @property
    def trusts_unchanged(self) -> bool:
        """Return whether files that did not change since they were verified are not read again."""
        return self.verify == "changed"

    @property
    def holds_out(self) -> bool:
        """Return whether the run has held-out rows."""
        return bool(self.eval_fraction) or self.eval_cache is not None

    def prompts_to_sample(self, *, in_sweep: bool = False) -> int:
        """Return how many held-out prompts are sampled at most.

        Args:
            in_sweep: whether the run is a trial of a sweep, which makes samples only if the sweep's config asks for them.
        """
        if self.samples is None:
            return USUAL_SAMPLES if self.holds_out and not in_sweep else 0
        return self.samples

    @property
    def keeps_best(self) -> bool:
        """Return whether a run with held-out rows ends with the model of its best evaluation."""
        return self.keep != "last"

    def updates(self, rows: int) -> int:
        """Return the number of updates of a run on that many training rows."""
        return self.max_steps or math.ceil(math.ceil(rows / self.batch_size) * self.epochs)

    @property
    def objective_weights(self) -> dict[str, float] | None:
        """Weights of `objective` by name; None without that option.

        Raises:
            ConfigError: it cannot be read.
        """
        return None if self.objective is None else parse_objective(self.objective)

    def _check_own_options(self) -> None:
        """Check the options that only one loss has."""
        if not 0 < self.clip_epsilon < 1:
            raise ConfigError(f"--clip-epsilon must be above 0 and below 1, got {self.clip_epsilon}.")
        if not 0 <= self.label_smoothing < 0.5:
            raise ConfigError(
                f"--label-smoothing must be at least 0 and below 0.5, where labels would tell nothing, got {self.label_smoothing}."
            )
        for name, loss in LOSS_OF_OPTION.items():
            if self.loss != loss and getattr(self, name) != getattr(type(self), name):
                raise ConfigError(
                    f"{flag(name)} {getattr(self, name):g} has no effect with --loss {self.loss}: it is an option of {loss}. Leave it out, "
                    f"or give --loss {loss}."
                )

    def _check_pairs(self) -> None:
        if self.batch_size % 2:
            raise ConfigError(
                f"--loss {self.loss} counts both rows of a pair in --batch-size: give an even number, not {self.batch_size}."
            )
        if (self.desirable_weight, self.undesirable_weight) != (1.0, 1.0):
            raise ConfigError(
                f"--loss {self.loss} compares the two rows of a pair: class weights have no meaning there. Leave "
                "--desirable-weight and --undesirable-weight at 1."
            )

    def _check_memory(self) -> None:
        if self.dtype == "float32":
            raise ConfigError(
                f"--memory {self.memory} keeps weights in bfloat16 and computes in it: leave out --dtype float32, or use "
                "--memory full."
            )
        if self.lora_rank:
            raise ConfigError(
                f"--memory {self.memory} is for training all weights. With --lora-rank the model is frozen in 16 bits "
                "already, and its adapters are small: leave --memory out."
            )
        if others := sorted(name for name in self.training if name.startswith("optim")):
            raise ConfigError(
                f"--memory {self.memory} has its own optimizer, AdamW for 16-bit weights: remove {' and '.join(others)} from "
                "training:. (Other optimizers round to the nearest, and KTO's small updates would be lost.)"
            )

    def _at_least(self, **least: float) -> None:
        for name, bound in least.items():
            value = getattr(self, name)
            if value is not None and not value >= bound:
                raise ConfigError(f"{flag(name)} must be at least {bound:g}, got {value}.")


def is_better(value: float, than: float, metric: str) -> bool:
    """Return whether a held-out value is better than another one; a smaller loss is, and a greater one of the other metrics."""
    return value < than if metric == "eval/loss" else value > than


def parse_objective(text: str) -> dict[str, float]:
    """Return the weights in `helpful=1,harmless=0.5`, or in a JSON object, which a mapping in Python becomes.

    Raises:
        ConfigError: no name and weight, a name that is given twice, or a weight that is negative or no finite number.
    """
    if text.lstrip().startswith("{"):
        with contextlib.suppress(ValueError, RecursionError):
            table = json.loads(text)
            return _checked_weights([*table.items()])
    return _checked_weights([(name, weight) for name, _, weight in (one.rpartition("=") for one in text.split(","))])


def _checked_weights(weights: list[tuple[str, object]]) -> dict[str, float]:
    found: dict[str, float] = {}
    for name, given in weights:
        weight = _weight(given)
        if not name.strip() or weight is None:
            expected = "--objective: expected names and weights such as helpful=1,harmless=0.5, got"
            if not name and isinstance(given, str) and given.strip():
                raise ConfigError(f"{expected} {shown(given)!r} without a weight. Write {shown(given.strip())}=1.")
            raise ConfigError(f"{expected} {shown(f'{name}={given}')!r}.")
        if not 0 <= weight < float("inf"):
            raise ConfigError(f"--objective {shown(name)}: a weight must be finite and not negative, got {weight:g}.")
        if weight > _MOST_WEIGHT:
            raise ConfigError(f"--objective {shown(name)}: a weight must be at most {_MOST_WEIGHT:g}, got {weight:g}.")
        if name.strip() in found:
            raise ConfigError(f"--objective {shown(name)}: given twice.")
        found[name.strip()] = weight
    if not any(found.values()):
        raise ConfigError("--objective: every weight is 0, so there is nothing to learn.")
    return found


def _weight(given: object) -> float | None:
    if isinstance(given, bool) or not isinstance(given, str | int | float):
        return None
    try:
        return float(given)
    except (ValueError, OverflowError):
        return None
