"""Stage 2 from end to end: `kto-train` trains a run, or evaluates one."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from offline_kto.kto_core.console import tell
from offline_kto.kto_core.durable_files import written_to
from offline_kto.kto_core.errors import ConfigError, TrainingError
from offline_kto.kto_core.launch import read_launch, settle_launch
from offline_kto.kto_core.lock import only_writer
from offline_kto.train.config import TrainConfig
from offline_kto.train.report.report import write_report
from offline_kto.train.run.evaluate_run import evaluate_run
from offline_kto.train.run.folder import choose_folder, refuse_occupied, refuse_unnamed
from offline_kto.train.run.inputs import Materials
from offline_kto.train.run.training_run import TrainingRun
from offline_kto.train.trainer.evaluation import summary_lines


def train(config: TrainConfig) -> Path:
    """Run `kto-train`.

    Returns:
        The run folder.

    Raises:
        KTOError: the user's input cannot be used, or training had to stop.
    """
    refuse_unnamed(config)
    settle_launch(shards=True)
    if config.evaluate_only is not None:
        return evaluate_run(config).parent
    if config.lora_rank:
        from offline_kto.train.model.lora import check_installed

        check_installed()
    out = choose_folder(config)
    with _folder_of(config, out):
        _train(config, out)
    return out


@contextlib.contextmanager
def _folder_of(config: TrainConfig, out: Path) -> Iterator[None]:
    """The run folder is this launch's alone; nothing is left of one in which no run began."""
    first = read_launch().is_first
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


def _train(config: TrainConfig, out: Path) -> None:
    run = TrainingRun.set_up(config, out, Materials())
    run.train()
    run.save_model(out)
    found = run.sum_up()
    if run.is_main:
        if found is not None:
            print("\n".join(summary_lines(found)))
        tell(f"report      {write_report([out])}")
        tell(f"wrote       {out}")
    accelerator = run.trainer.accelerator
    if accelerator.num_processes > 1:
        # A rank that leaves while another still saves takes the whole launch down.
        accelerator.wait_for_everyone()
        accelerator.end_training()
