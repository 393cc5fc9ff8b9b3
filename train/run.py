"""Stage 2 from end to end: cache, policy, checks, training, run folder."""

import contextlib
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from kto_core.durable import written_to
from kto_core.errors import ConfigError, TrainingError, in_one_line
from kto_core.head import whole_shape
from kto_core.lock import only_writer
from kto_core.manifest import differences
from kto_core.models import Precision, resolve_device, resolve_precision
from kto_core.options import Location
from kto_core.storage import local_copy, speaking_of
from train.advice import class_weight_values, warnings_for
from train.arguments import training_arguments
from train.cache_rows import CacheRows, EpochBatches, split_by_prompt
from train.card import write_card
from train.config import TrainConfig
from train.policy import PolicyFiles
from train.run_folder import (
    METRICS,
    choose_folder,
    last_checkpoint,
    publish_model,
    refuse_occupied,
    remove_leftovers,
    unfinished,
    write_start,
)
from train.sharding import gather_when_saving, prepare_sharding, sharding_asked_for
from train.start_check import check_start, tolerance_for
from train.trainer import KTOTrainer, Objective
from train.watching import Console, MetricsFile

_MAX_TOKENS_CPU = 1024


@dataclass(frozen=True)
class TrainingData:
    """The cache and which of its rows train; held-out rows may lie in another cache."""

    rows: CacheRows
    train: list[int]
    held_out: tuple[CacheRows, list[int]] | None

    @classmethod
    def open(cls, config: TrainConfig) -> "TrainingData":
        """Raises: CacheError, TrainingError: unusable caches, or nothing left on one side."""
        rows = _open(config.cache, config.max_length)
        everything = list(range(len(rows)))
        if config.eval_cache is not None:
            held = _open(config.eval_cache, config.max_length)
            _same_identity(rows, held)
            return cls(rows, everything, (held, list(range(len(held)))))
        if not config.eval_fraction:
            return cls(rows, everything, None)
        train, held_rows = split_by_prompt(rows, config.eval_fraction, config.seed)
        if not train or not held_rows:
            side = "trained on" if not train else "held out"
            raise TrainingError(
                f"--eval-fraction {config.eval_fraction:g} of {len(set(rows.prompt_ids))} prompts leaves no row to be {side}. "
                "Use another fraction, or --eval-cache."
            )
        return cls(rows, train, (rows, held_rows))


def _open(cache: Location, max_length: int | None) -> CacheRows:
    folder = local_copy(cache)
    with speaking_of(cache, folder):
        return CacheRows(folder, max_length=max_length)


def _same_identity(rows: CacheRows, held: CacheRows) -> None:
    lines = differences(held.manifest.identity, rows.manifest.identity)
    lines = [line for line in lines if not line.startswith("tokenization.max_length")]
    if lines:
        raise TrainingError("--eval-cache: scored by another reference than --cache:\n  " + "\n  ".join(lines))


def train(config: TrainConfig) -> Path:
    """Run `kto-train`.

    Returns:
        The run folder.

    Raises:
        KTOError: the user's input cannot be used, or training had to stop.
    """
    device = resolve_device(config.device)
    precision = resolve_precision(config.dtype, device)
    if config.lora_rank:
        from train.lora import check_installed

        check_installed()
    out = choose_folder(config)
    with _folder_of(config, out):
        _train(config, out, device, precision)
    return out


@contextlib.contextmanager
def _folder_of(config: TrainConfig, out: Path) -> Iterator[None]:
    """The run folder is this launch's alone; nothing is left of one in which no run began."""
    first = int(os.environ.get("RANK", "0")) == 0
    lock = only_writer(out, ConfigError) if first else contextlib.nullcontext()
    advice = "Make room, and pass --resume to go on from the last checkpoint."
    try:
        with lock, written_to(out, TrainingError, advice):
            if first:
                refuse_occupied(config, out)
            yield
    finally:
        if first:
            with contextlib.suppress(OSError):  # something was written there
                out.rmdir()


def _train(config: TrainConfig, out: Path, device: torch.device, precision: Precision) -> None:
    data = TrainingData.open(config)
    files = PolicyFiles.find(config, data.rows.manifest)
    weights = class_weight_values(config, *data.rows.class_counts(data.train))
    args = training_arguments(config, out, precision, held_out=data.held_out is not None)
    checkpoint = last_checkpoint(config, out, data.rows.manifest)
    if args.process_index == 0:
        remove_leftovers(out)
        _print_plan(config, data, files, precision, weights, out, device)
        if config.resume:
            print(f"resume      {checkpoint or 'no checkpoint there yet: starting from the beginning'}", flush=True)
    # A sharded model need not fit on one device; sharding moves each rank's part there.
    whole_fits = device.type == "cuda" and not sharding_asked_for()
    model = files.load(config, precision, args.device if whole_fits else torch.device("cpu"))
    _check_vocabulary(model, data.rows)
    trainer = _trainer(config, args, data, model, files, weights, out, checkpoint, precision)
    trainer.add_callback(_Start(trainer, config, data.rows, precision, files.name, out))
    try:
        trainer.train(resume_from_checkpoint=checkpoint)
    except torch.OutOfMemoryError as error:
        raise TrainingError(
            f"Out of memory with --max-tokens {trainer.max_tokens}, rows of at most {data.rows.max_length} tokens: "
            f"{in_one_line(error)} Use a smaller --max-tokens or --max-length, --gradient-checkpointing, --lora-rank 16 "
            "or an 8-bit optimizer (training: optim: adamw_bnb_8bit). --resume goes on from the last checkpoint."
        ) from error
    _save(trainer, files, config, out)
    if args.process_index == 0:
        write_card(out, config, data.rows.manifest, files, weights, trainer.state.log_history)
        print(f"wrote       {out}")
    if trainer.accelerator.num_processes > 1:
        # A rank that leaves while another still saves takes the whole launch down.
        trainer.accelerator.wait_for_everyone()
        trainer.accelerator.end_training()


class _Start(transformers.TrainerCallback):
    """Runs when the Trainer has prepared the model: in training precision, on its device."""

    def __init__(
        self,
        trainer: KTOTrainer,
        config: TrainConfig,
        rows: CacheRows,
        precision: Precision,
        policy: str,
        out: Path,
    ) -> None:
        self.trainer, self.config, self.rows = trainer, config, rows
        self.precision, self.policy, self.out = precision, policy, out

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # The last update is always on record; and a run that goes on from a checkpoint has nothing of what was added up
        # for the next record before it.
        control.should_log |= control.should_save or state.global_step >= state.max_steps

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.settle()
        if state.is_world_process_zero and self.trainer.measures_memory:
            print(f"memory      --max-tokens {self.trainer.max_tokens} (measured)", flush=True)
        if state.global_step >= state.max_steps:
            self.trainer.batches.finish()  # the Trainer looks only after an update whether it was the last
        if state.global_step:  # a resumed policy has left the reference
            if state.is_world_process_zero:
                self.trainer.remove_old_checkpoints()
            return
        allow = self.config.allow_different_policy
        found = check_start(self.trainer, self.rows, self.precision, policy=self.policy, allow=allow)
        if state.is_world_process_zero:
            write_start(self.config, self.out, self.rows.manifest)
            print(
                f"start       policy and cache differ by {found.mean:.1e} nats a token (mean), {found.largest:.1e} (max)"
            )


def _trainer(
    config: TrainConfig,
    args: transformers.TrainingArguments,
    data: TrainingData,
    model: Any,
    files: PolicyFiles,
    weights: tuple[float, float],
    out: Path,
    checkpoint: str | None,
    precision: Precision,
) -> KTOTrainer:
    batches = EpochBatches(
        data.train,
        config.batch_size,
        shuffle=config.shuffle,
        seed=config.seed,
    )
    watchers = [MetricsFile(out / METRICS), Console()] if args.process_index == 0 else []
    trainer = KTOTrainer(
        model=model,
        args=args,
        rows=data.rows,
        batches=batches,
        objective=Objective(config.beta, *weights),
        max_tokens=_max_tokens(config, args.device),
        rounding=tolerance_for(data.rows.manifest, precision),
        eval_data=data.held_out,
        processing_class=files.tokenizer,
        callbacks=watchers,
    )
    trainer.remove_callback(transformers.PrinterCallback)
    prepare_sharding(trainer.accelerator, precision.dtype, merges=bool(config.lora_rank and files.adapter))
    return trainer


def _max_tokens(config: TrainConfig, device: torch.device) -> int | None:
    """None: to be measured when the model is there."""
    if not isinstance(config.max_tokens, str):
        return config.max_tokens
    return None if device.type == "cuda" else _MAX_TOKENS_CPU


def _check_vocabulary(model: Any, rows: CacheRows) -> None:
    """A model with fewer embeddings than the tokenizer has ids would read past its table."""
    size = whole_shape(model.get_input_embeddings().weight)[0]
    if rows.largest_id >= size:
        raise TrainingError(
            f"The cache holds token id {rows.largest_id}, but the policy's vocabulary has {size} tokens: it is another model."
        )


def _save(trainer: KTOTrainer, files: PolicyFiles, config: TrainConfig, out: Path) -> None:
    main = trainer.is_world_process_zero()
    with unfinished(out, "model", main=main) as folder:
        if config.lora_rank and files.adapter is not None:
            from train.lora import merge_and_save

            if main:
                merge_and_save(trainer.accelerator.unwrap_model(trainer.model), folder)
                files.tokenizer.save_pretrained(str(folder))
        else:
            gather_when_saving(trainer.accelerator)
            trainer.save_model(str(folder))
        if main:
            # A pickle that nobody needs: config.yaml says it all.
            (folder / "training_args.bin").unlink(missing_ok=True)
            publish_model(folder, out)


def _print_plan(
    config: TrainConfig,
    data: TrainingData,
    files: PolicyFiles,
    precision: Precision,
    weights: tuple[float, float],
    out: Path,
    device: torch.device,
) -> None:
    desirable, undesirable = data.rows.class_counts(data.train)
    kind = f"LoRA rank {config.lora_rank}" if config.lora_rank else "all weights"
    held = f", {len(data.held_out[1]):,} held out" if data.held_out else ""
    dropped = f", {data.rows.dropped:,} dropped (prompt too long)" if data.rows.dropped else ""
    steps = config.max_steps or math.ceil(math.ceil(len(data.train) / config.batch_size) * config.epochs)
    fingerprint = data.rows.manifest.fingerprint[:12]
    print(f"cache       {config.cache} (fingerprint {fingerprint}, verified in {data.rows.seconds:.1f} s)")
    adapter = f" with adapter {files.adapter} merged" if files.adapter else ""
    print(f"policy      {files.name}{adapter} ({kind}, {precision.name} on {device})")
    print(f"rows        {len(data.train):,} to train on{held}{dropped}")
    print(
        f"labels      {desirable:,} desirable (weight {weights[0]:.4g}), {undesirable:,} undesirable (weight {weights[1]:.4g})"
    )
    print(
        f"updates     {steps:,} of {config.batch_size} rows, beta {config.beta:g}, learning rate {config.learning_rate:g}"
    )
    print(f"run         {out}")
    for line in _data_warnings(data, precision):
        print(f"warning     {line}")
    for line in warnings_for(config, desirable, undesirable, weights):
        print(f"warning     {line}")
    print(end="", flush=True)


def _data_warnings(data: TrainingData, precision: Precision) -> list[str]:
    lines = []
    scored = data.rows.manifest.reference.get("dtype")
    if scored != precision.name:
        lines.append(
            f"the cache was scored in {scored}, the policy computes in {precision.name}: rewards start off 0 by rounding. "
            f"kto-precompute --dtype {precision.name} scores as this run computes."
        )
    if data.held_out is not None and data.held_out[0] is not data.rows:
        shared = len(set(data.held_out[0].prompt_ids) & set(data.rows.prompt_ids))
        if shared:
            lines.append(
                f"{shared:,} prompts of --eval-cache are trained on as well; its values say little about new prompts."
            )
    return lines
