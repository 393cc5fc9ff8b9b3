"""Run stage 2 from end to end: `kto-train` trains a run, or evaluates one."""

import contextlib
import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from offline_kto.kto_core.cache.manifest import Manifest, read_manifest
from offline_kto.kto_core.cache.remote_cache import begun_downloads
from offline_kto.kto_core.console import tell
from offline_kto.kto_core.durable_files import written_to
from offline_kto.kto_core.errors import ConfigError, ModelError, TrainingError
from offline_kto.kto_core.launch import read_launch, settle_launch
from offline_kto.kto_core.locations import is_url
from offline_kto.kto_core.lock import only_writer
from offline_kto.kto_core.runtime import importing, leave_out, needless_packages
from offline_kto.train.config import TrainConfig
from offline_kto.train.report.report import write_report
from offline_kto.train.run.folder import RUNS, refuse_occupied, refuse_unnamed
from offline_kto.train.run_files import make_folder, name_folder

if TYPE_CHECKING:
    from offline_kto.train.data.training_data import TrainingData
    from offline_kto.train.publish.hub_repository import HubRepository
    from offline_kto.train.run.inputs import Materials


def train(config: TrainConfig, *, in_own_process: bool = False) -> Path:
    """Run `kto-train`.

    Args:
        in_own_process: whether nothing but this run uses the process, which may then do without packages it never needs.

    Returns:
        The run folder; with `dry_run` the one that the run would have.

    Raises:
        KTOError: the user's input cannot be used, or training had to stop.
    """
    if config.cache == Path(""):
        raise ConfigError("--cache is missing: name the folder that kto-precompute wrote.")
    refuse_unnamed(config)
    settle_launch(shards=True)
    if config.evaluate_only is not None:
        from offline_kto.train.run.evaluate_run import evaluate_run

        return evaluate_run(config).parent
    if config.lora_rank and importlib.util.find_spec("peft") is None:
        raise ModelError("--lora-rank needs peft. Install it with: pip install 'offline-kto[lora]'")
    manifests = [
        read_manifest(Path(location))
        for location in (config.cache, config.eval_cache)
        if location is not None and not is_url(location)
    ]
    if in_own_process:
        for package in _needless(config, manifests):
            leave_out(package)
    if config.dry_run:
        out = name_folder(config.out, RUNS)
        if out.is_dir():
            refuse_occupied(config, out)
        _plan(config, out, in_own_process=in_own_process)
        return out
    out = make_folder(config.out, RUNS)
    with _folder_of(config, out), _begun_downloads(config):
        _train(config, out, in_own_process=in_own_process)
    return out


def _begun_downloads(config: TrainConfig) -> contextlib.AbstractContextManager[None]:
    """Download remote caches while libraries are imported; one process of a machine does it for all."""
    if read_launch().local_share[0]:
        return contextlib.nullcontext()
    return begun_downloads(config.cache, config.eval_cache)


def _needless(config: TrainConfig, manifests: list[Manifest]) -> list[str]:
    """Return the packages that transformers would import, and that this run never needs."""
    has_adapter = any(manifest.reference.get("adapter") for manifest in manifests)
    return needless_packages(
        may_need_peft=bool(config.lora_rank or is_url(config.cache) or has_adapter),
        trust_remote_code=config.trust_remote_code,
    )


@contextlib.contextmanager
def _folder_of(config: TrainConfig, out: Path) -> Iterator[None]:
    """Hold the run folder's lock in the block; remove the folder afterwards if no run began in it."""
    first = read_launch().is_first
    lock = only_writer(out, ConfigError) if first else contextlib.nullcontext()
    advice = "Make room, and pass --resume to continue from the last checkpoint."
    try:
        with lock, written_to(out, TrainingError, advice):
            if first:
                refuse_occupied(config, out)
            yield
    finally:
        if first:
            with contextlib.suppress(OSError):  # the folder is not empty
                out.rmdir()


def _plan(config: TrainConfig, out: Path, *, in_own_process: bool) -> None:
    _find_repository(config)
    materials, data = _open_data(config, out, in_own_process=in_own_process)
    from offline_kto.train.run.planned_run import Plan

    plan = Plan.make(config, out, data, materials)
    plan.check()
    if plan.is_main:
        tell("dry run     nothing was trained, and nothing was written")


def _open_data(config: TrainConfig, out: Path, *, in_own_process: bool) -> "tuple[Materials, TrainingData]":
    """Open the caches, and print what they hold."""
    if read_launch().is_first:
        tell(f"starting    {config.cache} -> {out}")  # the imports below take seconds
    with importing(in_own_process=in_own_process):
        from offline_kto.train.run.inputs import Materials
        from offline_kto.train.run.plan import print_data

    materials = Materials()
    data = materials.data(config)
    if read_launch().is_first:
        print_data(config, data)
    return materials, data


def _find_repository(config: TrainConfig) -> "HubRepository | None":
    """Return the repository that the run is uploaded to, on the process that uploads; None if it is not uploaded."""
    if config.push_to_hub is None or not read_launch().is_first:
        return None
    from offline_kto.train.publish.hub_repository import HubRepository

    return HubRepository.find(config)


def _train(config: TrainConfig, out: Path, *, in_own_process: bool) -> None:
    repository = _find_repository(config)
    materials, data = _open_data(config, out, in_own_process=in_own_process)
    with importing(in_own_process=in_own_process):
        # The Trainer takes seconds to import; what is wrong with the data has been said by now.
        from offline_kto.train.run.training_run import TrainingRun
        from offline_kto.train.trainer.evaluation import summary_lines, verdict_lines

    run = TrainingRun.set_up(config, out, data, materials)
    if repository is not None:
        repository.create()
    run.train()
    run.save_model(out)
    found = run.sum_up()
    of_samples = run.finish_samples()
    if run.is_main:
        run.write_card(out, found, repository.name if repository is not None else None)
        summed_up = [*(summary_lines(found) if found is not None else []), *verdict_lines(found)]
        for line in [*summed_up, *of_samples, *run.write_suspects(out)]:
            tell(line)
        tell(f"report      {write_report([out])}")
        tell(f"wrote       {out}")
    accelerator = run.trainer.accelerator
    if accelerator.num_processes > 1:
        # A rank that exits while another one saves would abort the whole launch.
        accelerator.wait_for_everyone()
        accelerator.end_training()
    if repository is not None:  # the other ranks do not wait for it
        repository.upload(run.collect_upload(), out)
