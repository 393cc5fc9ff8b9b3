"""Decide which options may differ when a run is resumed: every option is fixed, logged or free.

fixed   another value would give another run: rows repeated or skipped, weights that do not fit, an optimizer or a
        schedule that continues with the old value. A change is an error.
logged  it may change, and the change is logged. Options of the loss are fixed once all updates are made: a change would
        only relabel them.
free    it changes no result.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path

from offline_kto.kto_core.errors import ConfigError, shown
from offline_kto.kto_core.options import AUTO, as_plain, flag, with_absolute_paths
from offline_kto.train.config import USUAL_RATE, USUAL_RATE_OF_LORA, TrainConfig
from offline_kto.train.run_records import ComputedWith, RunRecord


def _names(words: str) -> frozenset[str]:
    return frozenset(words.split())


FIXED = _names(
    "model trust_remote_code loss objective batch_size seed shuffle balance max_length eval_fraction eval_seed metric lora_rank "
    "lora_alpha lora_targets memory learning_rate scheduler warmup weight_decay"
)
OF_LOSS = _names(
    "beta desirable_weight undesirable_weight humanline_low humanline_high clip_epsilon label_smoothing simpo_gamma sft_weight"
)
LOGGED = OF_LOSS | _names(
    "max_steps epochs keep early_stopping eval_cache eval_steps device attention reduce_dtype save_dtype"
)
FREE = _names(
    # Compared elsewhere: the cache by content, the precision as resolved, and `training` key by key.
    "cache out dtype training max_tokens gradient_checkpointing save_steps logging_steps report_to resume evaluate_only dry_run "
    "plan_memory samples samples_at allow_different_policy push_to_hub verify"
)

# Keys of the `training:` table. A key in neither list is fixed, so a new key of transformers is too.
TRAINING_LOGGED = _names(
    "accelerator_config deepspeed eval_delay eval_on_start eval_strategy fsdp fsdp_config full_determinism "
    "liger_kernel_config parallelism_config save_strategy torch_compile torch_compile_backend torch_compile_mode "
    "use_liger_kernel"
)
TRAINING_FREE = _names(
    "activation_checkpointing_kwargs batch_eval_metrics dataloader_drop_last dataloader_in_order "
    "dataloader_multiprocessing_context dataloader_num_workers "
    "dataloader_persistent_workers dataloader_pin_memory dataloader_prefetch_factor ddp_backend ddp_broadcast_buffers "
    "ddp_bucket_cap_mb ddp_find_unused_parameters ddp_static_graph ddp_timeout debug disable_tqdm do_eval do_predict "
    "do_train enable_jit_checkpoint eval_accumulation_steps eval_do_concat_batches eval_use_gather_object "
    "gradient_checkpointing_kwargs hub_always_push hub_private_repo hub_revision hub_strategy hub_token "
    "include_for_metrics include_num_input_tokens_seen label_names length_column_name local_rank log_level "
    "log_level_replica log_on_each_node logging_dir logging_first_step logging_nan_inf_filter logging_strategy prediction_loss_only "
    "project remove_unused_columns run_name save_on_each_node save_only_model save_total_limit "
    "skip_memory_metrics torch_empty_cache_steps trackio_bucket_id trackio_space_id trackio_static_space_id "
    "use_cache"
)
_OF_OPTIMIZER = ("optim", "adam")


def compare_options(
    config: TrainConfig, started: Mapping[str, object], where: Path, *, finished: bool = False
) -> list[str]:
    """Compare a run's options with those of its continuation.

    Args:
        started: the options in config.yaml.
        where: the run folder, for messages.
        finished: whether the continuation would make no update.

    Returns:
        One line for each permitted change.

    Raises:
        ConfigError: an option changed that is fixed.
    """
    if not isinstance(started.get("training", {}), dict):
        raise ConfigError(f"--resume {where}: in its config.yaml, training: is not a table. Start a new run.")
    before = _effective({**as_plain(TrainConfig()), **started})
    now = _effective(with_absolute_paths(TrainConfig, as_plain(config)))  # as config.yaml has them
    tables = _table(now), _table(before)
    _compare_training(*tables, where)
    for name in sorted(FIXED | OF_LOSS if finished else FIXED, key=list(now).index):
        if before.get(name) != now[name]:
            why = " All its updates are made." if name in OF_LOSS else ""
            raise ConfigError(
                f"--resume {where}: the run was started with {flag(name)} {shown(before.get(name))}, not {now[name]}.{why} "
                "Pass the same value, or start a new run."
            )
    lines = [(flag(name), now[name], before.get(name)) for name in now if name in LOGGED]
    lines += [(f"training: {name}", new, old) for name, new, old in _changed(*tables) if name in TRAINING_LOGGED]
    return [f"{name} is {new}, was {shown(old)}" for name, new, old in lines if new != old]


def compare_records(now: ComputedWith, started: RunRecord, where: Path) -> list[str]:
    """Compare the settings a run computed with and those of its continuation.

    Args:
        now: settings of the continuation.
        started: run.json; a field that an older version did not write is not compared.

    Returns, Raises: as `compare_options`.
    """
    before: Mapping[str, object] = started
    wanted: Mapping[str, object] = now
    for name, what, advice in (
        ("precision", "in another precision", "Pass --dtype {}"),
        ("held_out_cache", "with other held-out rows", "Pass the --eval-cache it was started with"),
    ):
        if name in before and before[name] != wanted[name]:
            values = f" ({shown(before[name])}, now {shown(wanted[name])})" if name == "precision" else ""
            raise ConfigError(
                f"--resume {where}: the run was started {what}{values}. {advice.format(shown(before[name]))}, or start a new run."
            )
    versions = started.get("versions")
    known = versions if isinstance(versions, dict) else {}
    return [
        f"{name} is {version}, was {shown(known[name])}"
        for name, version in now["versions"].items()
        if name in known and known[name] != version
    ]


def _effective(options: dict[str, object]) -> dict[str, object]:
    """Return options with missing values replaced by their defaults."""
    rank, alpha = options.get("lora_rank"), options.get("lora_alpha")
    if isinstance(rank, int):
        options["lora_alpha"] = (alpha or 2 * rank) if rank else None
    if options.get("learning_rate") == AUTO:
        options["learning_rate"] = USUAL_RATE_OF_LORA if rank else USUAL_RATE
    options["keep"] = options.get("keep") or "best"
    if options.get("eval_seed") is None:
        options["eval_seed"] = options.get("seed")
    return options


def _table(options: dict[str, object]) -> dict[str, object]:
    table = options.get("training") or {}
    assert isinstance(table, dict)
    return table


def _compare_training(now: dict[str, object], before: dict[str, object], where: Path) -> None:
    for name, new, old in _changed(now, before):
        if name in TRAINING_LOGGED | TRAINING_FREE:
            continue
        what = (
            "another optimizer, whose state is in its checkpoint"
            if name.startswith(_OF_OPTIMIZER)
            else "other settings"
        )
        raise ConfigError(
            f"--resume {where}: the run was started with {what} (training: {name}: {shown(old)}, not {shown(new)}). Pass the "
            "same, or start a new run."
        )


def _changed(now: dict[str, object], before: dict[str, object]) -> Iterator[tuple[str, object, object]]:
    """Yield (key, value now, value before) of the `training:` table's keys that changed."""
    for name in sorted({*now, *before}, key=str):
        new, old = (table[name] if name in table else _default(name) for table in (now, before))
        if new != old:
            yield str(name), new, old


def _default(name: str) -> object:
    import transformers  # slow to import, and only needed by a resumed run

    field = transformers.TrainingArguments.__dataclass_fields__.get(name)
    if field is None or field.default is dataclasses.MISSING:
        return None
    return getattr(field.default, "value", field.default)  # an enumeration is compared by its value
