"""Declare the options of `kto-precompute` and their defaults."""

import re
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from offline_kto.kto_core.errors import ConfigError, shown
from offline_kto.kto_core.feedback.labels import COUNT, SHARE, UNANIMOUS, number_in
from offline_kto.kto_core.feedback.template_settings import NOT_FOR_DATA
from offline_kto.kto_core.locations import Location, is_url
from offline_kto.kto_core.options import (
    AUTO,
    OTHER_NAMES_OF_TYPES,
    check_options,
    folder_or_name,
    option,
    parse_settings,
)

BACKENDS = (AUTO, "transformers", "vllm")
PAIRINGS = ("shuffled", "rotate")
CHAT = (AUTO, "always", "never")
VOTES = (SHARE, COUNT, UNANIMOUS)
DTYPES = (AUTO, "float32", "bfloat16", "float16")

_CLUSTER = re.compile(r"auto|(?:ray://)?(?:[^\s/:]+|\[[\da-fA-F:]+\]):\d{1,5}")

# Options that change neither rows nor scores: where and by whom the work is done.
OF_THE_RUN = ("out", "workers", "read_workers", "cluster", "plan_only", "part", "dry_run", "overwrite")


@dataclass(frozen=True)
class PrecomputeConfig:
    """The options of `kto-precompute`."""

    model: str = option("", "The reference: a local folder or a hub id.", metavar="MODEL", may_be_path=folder_or_name)
    data: str = option(
        "",
        "Feedback: JSONL, JSON, CSV or Parquet (.gz too), a dataset folder or a hub id.",
        metavar="FILE",
        may_be_path=folder_or_name,
    )
    out: Location = option(
        Path("refs"), "Folder of the reference cache, or its URL (s3://, gs://, hf://).", metavar="DIR"
    )
    backend: str = option(AUTO, "Engine that scores.", choices=BACKENDS)
    adapter: str | None = option(
        None, "PEFT adapter to merge into the reference.", metavar="DIR", may_be_path=folder_or_name
    )
    revision: str | None = option(None, "Commit, tag or branch of a hub model.")
    max_length: int = option(1024, "Tokens in prompt and completion together; longer completions are cut.")
    dtype: str = option(
        AUTO,
        "Precision; auto is bfloat16 on a GPU and float32 on a CPU. bf16, fp16 and fp32 are understood.",
        choices=DTYPES,
        synonyms=OTHER_NAMES_OF_TYPES,
    )
    device: str = option(
        AUTO,
        "auto, cpu, cuda, cuda:N, or all: every GPU of one process shares one model. auto does that if the model does not "
        "fit on one GPU.",
    )
    attention: str = option(
        AUTO,
        "Attention of Transformers: auto, sdpa, flash, flex, varlen, or a name in transformers or on the hub; changes "
        "results only by rounding. auto is flash attention on a GPU where it is installed, or else varlen, or else the model's own.",
        metavar="auto|sdpa|flash|NAME",
    )
    max_tokens: int | None = option(
        None,
        "Tokens in one forward pass; limits memory, and changes results only by rounding.  [default: 32768 on a GPU, 4096 on a CPU]",
    )
    tensor_parallel: int = option(1, "GPUs that share the model (vLLM).")
    gpu_memory_utilization: float = option(0.8, "Share of each GPU's memory that vLLM takes.")
    kl_partners: int = option(1, "Mismatched completions for each row.")
    pairing: str = option("shuffled", "How mismatched completions are chosen.", choices=PAIRINGS)
    pairing_block: int = option(32, "Rows in one block of --pairing rotate.")
    seed: int = option(0, "Seed of the pairing.", most=2**64 - 1)
    rows_per_shard: int = option(4096, "Rows in one Parquet file.")
    limit: int | None = option(None, "Read the first N records only.", metavar="N")
    rating_threshold: str | None = option(
        None, "Ratings of at least this are desirable: a number or 'median'.", metavar="NUMBER|median"
    )
    prompt_field: str | None = option(None, "Field that holds the prompt, or a JMESPath: input.messages.")
    completion_field: str | None = option(None, "Field that holds the completion.")
    label_field: str | None = option(None, "Field that holds the label (or the rating), or the name of a score.")
    up: str | None = option(None, "Desirable values, such as like or '>=4', separated by commas.", metavar="VALUE,...")
    down: str | None = option(None, "Undesirable values, such as dislike or '<=2'.", metavar="VALUE,...")
    votes: str = option(
        SHARE,
        "What several raters make of a row: the shares of their votes, their numbers (more votes weigh more), or nothing unless "
        "they are unanimous.",
        choices=VOTES,
    )
    rating_scale: str | None = option(
        None,
        "Lowest and highest rating: a rating is a share of desirable, in place of a threshold.",
        metavar="LOW:HIGH",
    )
    weight_field: str | None = option(
        None, "Field that holds the weight of a row; normalised to a mean of 1, and 0 leaves a row out."
    )
    map: str | None = option(
        None,
        "How to read the file: a mapping (YAML), or the name of a format.",
        metavar="FILE|NAME",
        may_be_path=lambda text: bool(Path(text).suffix) or Path(text).parent != Path(),
    )
    split: str = option("train", "Split to read, if the data have several.")
    on_bad_row: str = option("error", "Stop at defective rows, or leave them out.", choices=("error", "skip"))
    left_out: Path | None = option(None, "File for the rows that are left out, with their reasons.", metavar="FILE")
    one_class: bool = option(False, "Accept feedback that is all desirable, or all undesirable.")
    chat: str = option(
        "auto", "Convert plain text to chat messages; auto: if the tokenizer has a chat template.", choices=CHAT
    )
    chat_template: Path | None = option(
        None,
        "Chat template (Jinja) in place of the tokenizer's own; the trained model is saved with it.",
        metavar="FILE",
    )
    chat_template_kwargs: str | None = option(
        None,
        "Variables of the chat template for all rows, like enable_thinking=false, or JSON.",
        metavar="NAME=VALUE,...",
        table=True,
    )
    template_date: str | None = option(
        None, "Day for chat templates that write the date.  [default: the cache's, or today]", metavar="YYYY-MM-DD"
    )
    tokenizer_kwargs: str | None = option(
        None, "Options for loading the tokenizer, like fix_mistral_regex=true.", metavar="NAME=VALUE,...", table=True
    )
    trust_remote_code: bool = option(False, "Run code that comes with the model.")
    workers: int | None = option(
        None,
        "Processes that score, each on its own GPU (with --tensor-parallel, group of GPUs).  [default: all GPUs; on a CPU 1]",
        metavar="N",
    )
    read_workers: int | None = option(
        None,
        "Processes that read large JSON Lines; 1 reads in this process.  [default: one for each core from 32 MiB on]",
        metavar="N",
    )
    cluster: str | None = option(
        None,
        "Ray cluster whose GPUs score, or with --device cpu its CPUs; nodes may join and leave.",
        metavar="auto|HOST:PORT|ray://HOST:PORT",
    )
    plan_only: bool = option(False, "Write the plan of every shard into --out and stop; --part scores them.")
    part: str | None = option(
        None, "Score the I-th of N parts of the planned shards, I from 0; needs --plan-only first.", metavar="I/N"
    )
    overwrite: bool = option(False, "Replace a cache of another reference in --out.")
    dry_run: bool = option(False, "Stop after the plan.")

    def __post_init__(self) -> None:
        check_options(self)
        for name, least in (
            ("max_length", 2),
            ("max_tokens", 1),
            ("tensor_parallel", 1),
            ("kl_partners", 1),
            ("pairing_block", 2),
            ("rows_per_shard", 1),
            ("limit", 1),
            ("workers", 1),
            ("read_workers", 1),
            ("seed", 0),
        ):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ConfigError(f"--{name.replace('_', '-')} must be at least {least}, got {value}.")
        taken = [name for name in self.template_settings if name in NOT_FOR_DATA]
        if taken:
            raise ConfigError(f"--chat-template-kwargs: {taken[0]!r} is not a variable of a template.")
        for name, setting in self.tokenizer_options.items():
            if name == "trust_remote_code" or not isinstance(setting, bool | int | float):
                raise ConfigError(f"--tokenizer-kwargs: {name} must be true, false or a number.")
        if self.template_date is not None:
            _ = self.template_day
        if self.rating_scale is not None:
            _ = self.graded
        if self.part is not None:
            self._check_part()
        if self.cluster is not None:
            self._check_cluster()
        if self.plan_only and is_url(self.out):
            raise ConfigError("--plan-only: --out must be a folder that all parts see, not a URL.")
        if not 0 < self.gpu_memory_utilization <= 1:
            raise ConfigError(
                f"--gpu-memory-utilization must be above 0 and at most 1, got {self.gpu_memory_utilization:g}."
            )

    def _check_cluster(self) -> None:
        if _CLUSTER.fullmatch(str(self.cluster)) is None:
            raise ConfigError(f"--cluster: expected auto, HOST:PORT or ray://HOST:PORT, got {shown(self.cluster)}.")
        if self.part is not None or self.plan_only:
            raise ConfigError("--cluster has its own workers: remove --part and --plan-only, or --cluster.")
        if self.device not in (AUTO, "cpu", "cuda"):
            raise ConfigError(f"--cluster: Ray chooses the GPU of each worker. Remove --device {self.device}.")
        if is_url(self.out):
            raise ConfigError(f"--cluster {self.cluster}: --out must be a folder that all nodes see, not a URL.")

    def _check_part(self) -> None:
        _ = self.numbered_part
        for name in ("plan_only", "dry_run", "overwrite"):
            if getattr(self, name):
                raise ConfigError(f"--part scores what is planned; remove --{name.replace('_', '-')}.")
        if (self.workers or 1) > 1:
            raise ConfigError("--part is one worker: remove --workers, and start several parts at once.")
        if is_url(self.out):
            raise ConfigError(
                f"--part {self.part}: --out must be a folder that all parts see, not a URL. Publish from there with kto-precompute "
                "without --part."
            )

    @property
    def numbered_part(self) -> tuple[int, int] | None:
        """Number of this part, from 0, and number of parts of `--part`; None if it is not set."""
        if self.part is None:
            return None
        found = re.fullmatch(r"(\d{1,9})/(\d{1,9})", self.part.strip())
        number, parts = map(int, found.groups()) if found else (0, 0)
        if number >= parts:
            raise ConfigError(
                f"--part must be I/N with I from 0 to N - 1, like 0/8 for the first of 8 parts, got {shown(self.part)!r}."
            )
        return number, parts

    @property
    def template_settings(self) -> dict[str, object]:
        return parse_settings(self.chat_template_kwargs, "--chat-template-kwargs")

    @property
    def tokenizer_options(self) -> dict[str, object]:
        return parse_settings(self.tokenizer_kwargs, "--tokenizer-kwargs")

    @property
    def graded(self) -> tuple[float, ...]:
        """The two ratings of `--rating-scale`; empty if it is not set."""
        if self.rating_scale is None:
            return ()
        ends = [number_in(part) for part in self.rating_scale.split(":")]
        least, most = ends if len(ends) == 2 else (None, None)
        if least is None or most is None or least >= most:
            raise ConfigError(
                f"--rating-scale must be the lowest and the highest rating, like 1:5, got {shown(self.rating_scale)!r}."
            )
        return least, most

    @property
    def template_day(self) -> datetime | None:
        """The date of `--template-date`; None if it is not set."""
        if self.template_date is None:
            return None
        try:
            return datetime.fromisoformat(self.template_date).replace(tzinfo=None)
        except ValueError:
            raise ConfigError(
                f"--template-date must be a day like 2026-01-31, got {shown(self.template_date)!r}."
            ) from None
