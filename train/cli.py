"""Command line of `kto-train`: options in, one call, errors out."""

import os
import signal
import sys
from pathlib import Path
from typing import Any

import click

from kto_core.errors import KTOError
from kto_core.options import click_settings, resolve
from train.config import TrainConfig


class _Command(click.Command):
    """Turns the errors a user can mend into one message and exit code 1."""

    def invoke(self, ctx: click.Context) -> Any:
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:  # a launcher's ranks wait for each other outside of Python
            signal.signal(signal.SIGTERM, signal.default_int_handler)  # what schedulers send: as Ctrl-C
        try:
            return super().invoke(ctx)
        except KTOError as error:
            raise click.ClickException(str(error)) from None
        except KeyboardInterrupt:
            click.echo(
                "\nInterrupted. What was finished is kept; run the same command with --resume to go on.", err=True
            )
            ctx.exit(130)


def _options(command: Any) -> Any:
    for flags, settings in reversed(click_settings(TrainConfig)):
        if "choices" in settings:
            settings["type"] = click.Choice(settings.pop("choices"))
        command = click.option(*flags, **settings)(command)
    return command


@click.command(cls=_Command, context_settings={"max_content_width": 120})
@click.option("--config", type=click.Path(path_type=Path), help="YAML with any of these options.", metavar="FILE")
@_options
@click.pass_context
def train(ctx: click.Context, /, config: Path | None, **values: Any) -> None:
    """Train the policy against cached reference scores; no reference model is loaded.

    \b
    kto-train --cache refs/ --out runs/first
    """
    from kto_core.allocator import keep_freed_memory
    from kto_core.quiet import quiet_libraries

    given = {k: v for k, v in values.items() if ctx.get_parameter_source(k) is click.core.ParameterSource.COMMANDLINE}
    if values["evaluate_only"] is not None:
        # The run's own options: its beta and hold-out, unless the command line says otherwise.
        if config is not None:
            raise click.UsageError("--evaluate-only reads the run's own config.yaml; leave --config out.", ctx)
        config = values["evaluate_only"] / "config.yaml"
    resolved = resolve(TrainConfig, given, yaml_path=config)
    if resolved.cache == Path(""):
        raise click.UsageError("Missing option '--cache'.", ctx)
    keep_freed_memory()
    quiet_libraries()
    from train.run import train as run

    run(resolved)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        # All is saved and all ranks have met. Tearing the interpreter down around gloo's threads now and then
        # aborts ("terminate called without an active exception"), and the launcher would call the run failed.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)
