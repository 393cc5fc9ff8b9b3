"""Define the command lines `kto-train`, `kto-sweep` and `kto-report`: parse options, make one call, print errors."""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from offline_kto.kto_core.console import shown_lines, warn
from offline_kto.kto_core.errors import KTOError, printable
from offline_kto.kto_core.interrupts import exit_code, raise_on_sigterm
from offline_kto.kto_core.launch import is_first_process, settle_launch, world_size
from offline_kto.kto_core.options import click_settings, flag, resolve
from offline_kto.kto_core.runtime import keep_freed_memory, quiet_libraries, use_expandable_segments
from offline_kto.kto_core.streams import own_streams
from offline_kto.train.config import OF_EVALUATION, TrainConfig
from offline_kto.train.run_files import begun_with, check_is_run
from offline_kto.train.sweep.config import SweepConfig

_Config = TypeVar("_Config", TrainConfig, SweepConfig)


class _Command(click.Command):
    """A command that turns an error the user can fix into one message and exit code 1."""

    how_to_continue = (
        "run the same command with --resume to continue (or kto-train --resume --out with the run's folder)"
    )

    def main(self, *args: Any, **options: Any) -> Any:
        with own_streams():
            return super().main(*args, **options)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            if world_size() == 1:  # under a launcher the ranks wait for each other in native code
                raise_on_sigterm()
            with shown_lines():
                return super().invoke(ctx)
        except KTOError as error:
            raise click.ClickException(str(error)) from None
        except KeyboardInterrupt as error:
            if is_first_process():
                click.echo(f"\nInterrupted. Finished work is kept; {self.how_to_continue}.", err=True)
            ctx.exit(exit_code(error))


class _Choice(click.Choice[str]):
    """One of several words; the error says what to do instead of another one."""

    def __init__(self, choices: list[str], hint: str) -> None:
        super().__init__(choices)
        self._hint = hint

    def get_invalid_choice_message(self, value: str, ctx: click.Context | None) -> str:
        return f"{super().get_invalid_choice_message(value, ctx)}{self._hint}"


class _SweepCommand(_Command):
    how_to_continue = "run the same command with the same --out to continue"


def _options(config: type) -> Callable[[Any], Any]:
    def add(command: Any) -> Any:
        for flags, settings in reversed(click_settings(config)):
            if "choices" in settings:
                settings["type"] = _Choice(settings.pop("choices"), settings.pop("hint", ""))
            command = click.option(*flags, **settings)(command)
        return command

    return add


def _given(ctx: click.Context, values: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in values.items() if ctx.get_parameter_source(k) is click.core.ParameterSource.COMMANDLINE}


def _ready(ctx: click.Context, config: type[_Config], values: dict[str, Any], yaml_path: Path | None) -> _Config:
    """Return the checked options, once the process is ready for the heavy libraries to be imported."""
    of_a_run = values.get("evaluate_only") is not None
    given = _given(ctx, values)
    begun = begun_with(given, yaml_path)
    resolved = resolve(config, given, yaml_path=yaml_path, foreign=of_a_run, begun_with=begun)
    if resolved.cache == Path(""):
        unknown = (
            f" No run has begun in {printable(str(given['out']))} that could name it." if given.get("resume") else ""
        )
        raise click.UsageError(f"Missing option '--cache'.{unknown}", ctx)
    settle_launch(shards=config is TrainConfig)
    keep_freed_memory()
    use_expandable_segments()
    quiet_libraries()
    return resolved


_OF_PLANNING = frozenset(["plan_memory", "lora_rank", "trust_remote_code"])


def _plan_memory(ctx: click.Context, values: dict[str, Any], config: Path | None) -> None:
    if values["lora_rank"] < 0:
        raise click.UsageError(f"--lora-rank must be at least 1, got {values['lora_rank']}.", ctx)
    others = ["--config"] if config is not None else []
    others += [flag(name) for name in _given(ctx, values) if name not in _OF_PLANNING]
    quiet_libraries()
    from offline_kto.train.model.memory_by_recipe import LORA_RANK
    from offline_kto.train.run.memory_table import print_memory

    if others:
        warn(f"{', '.join(others)}: of no effect; --plan-memory compares all recipes")
    rank = values["lora_rank"] or LORA_RANK
    print_memory(values["plan_memory"], lora_rank=rank, trust_remote_code=values["trust_remote_code"])


_SETTINGS = {"max_content_width": 120, "help_option_names": ["-h", "--help"]}


@click.command(cls=_Command, context_settings=_SETTINGS)
@click.option(
    "--config",
    type=click.Path(path_type=Path),
    help="YAML with any of these options; kto and lora come with the package.",
    metavar="FILE",
)
@_options(TrainConfig)
@click.version_option(package_name="offline-kto")
@click.pass_context
def train(ctx: click.Context, /, config: Path | None, **values: Any) -> None:
    """Train the policy against cached reference scores; no reference model is loaded.

    \b
    kto-train --cache refs/ --out runs/first
    """
    if values["plan_memory"] is not None:
        _plan_memory(ctx, values, config)
        return
    if values["evaluate_only"] is not None:
        # Use the options of the run (its beta, its hold-out) unless the command line overrides them.
        if config is not None:
            raise click.UsageError("--evaluate-only reads the run's own config.yaml; remove --config.", ctx)
        others = sorted(set(_given(ctx, values)) - OF_EVALUATION)
        if others:
            raise click.UsageError(f"--evaluate-only uses the run's own options; remove {flag(others[0])}.", ctx)
        run_folder = values["evaluate_only"]
        check_is_run(run_folder, "--evaluate-only")
        config = run_folder / "config.yaml"
    resolved = _ready(ctx, TrainConfig, values, config)
    from offline_kto.train.run.train_run import train as run

    run(resolved, in_own_process=True)
    if world_size() > 1:
        # Everything is saved and all ranks are synchronized. Interpreter shutdown with gloo's threads alive sometimes
        # aborts ("terminate called without an active exception"), and the launcher would report a failed run.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


@click.command(cls=_SweepCommand, context_settings=_SETTINGS)
@click.option(
    "--config",
    type=click.Path(path_type=Path),
    help="YAML with space:, train: and any of these options; sweep comes with the package.",
    metavar="FILE",
)
@_options(SweepConfig)
@click.version_option(package_name="offline-kto")
@click.pass_context
def sweep(ctx: click.Context, /, config: Path | None, **values: Any) -> None:
    """Run many trials on one cache; each worker loads the policy once, and no reference is loaded.

    \b
    kto-sweep --cache refs/ --config sweep --out sweeps/first
    """
    if config is None:
        raise click.UsageError(
            "Missing option '--config': a YAML with space: and train:, or `--config sweep`, which comes with the package.",
            ctx,
        )
    resolved = _ready(ctx, SweepConfig, values, config)
    from offline_kto.train.sweep.sweep import sweep as run

    run(resolved, yaml_path=config)


@click.command(cls=_Command, context_settings=_SETTINGS)
@click.argument("folders", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="RUN_OR_SWEEP...")
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    help="HTML file.  [default: report.html in the folder, or here for several]",
    metavar="FILE",
)
@click.version_option(package_name="offline-kto")
def report(folders: tuple[Path, ...], out: Path | None) -> None:
    """Write an HTML report of runs and sweeps, as one file.

    \b
    kto-report runs/first
    kto-report runs/first runs/second --out compared.html
    """
    from offline_kto.train.report.report import write_report

    click.echo(printable(f"wrote       {write_report(folders, out)}"))
