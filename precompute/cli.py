"""Define the command lines `kto-precompute` and `kto-cache`: parse options, call one function, print errors."""

from pathlib import Path
from typing import Any

import click

from offline_kto.kto_core.console import shown_lines
from offline_kto.kto_core.errors import KTOError
from offline_kto.kto_core.interrupts import exit_code, raise_on_sigterm
from offline_kto.kto_core.launch import is_first_process, settle_launch
from offline_kto.kto_core.locations import Location, to_location
from offline_kto.kto_core.options import click_settings, resolve
from offline_kto.kto_core.runtime import keep_freed_memory, quiet_libraries
from offline_kto.kto_core.streams import own_streams
from offline_kto.precompute.config import PrecomputeConfig


class _Command(click.Command):
    """A command that prints errors which a user can fix as one message, with exit code 1."""

    def main(self, *args: Any, **options: Any) -> Any:
        with own_streams():
            return super().main(*args, **options)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        # Of an option that is given twice, click takes the last: of two files of feedback, one would be lost.
        order = self.make_parser(ctx).parse_args(args=list(args))[2]
        if sum(parameter.name == "data" for parameter in order) > 1:
            raise click.UsageError(
                "--data is given several times, but only one is read. Put the files into a folder, and give the folder.",
                ctx,
            )
        return super().parse_args(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            raise_on_sigterm()
            with shown_lines():
                return super().invoke(ctx)
        except KTOError as error:
            raise click.ClickException(str(error)) from None
        except KeyboardInterrupt as error:
            if is_first_process():
                click.echo("\nInterrupted. Run the same command again to continue.", err=True)
            ctx.exit(exit_code(error))


def _options(command: Any) -> Any:
    for flags, settings in reversed(click_settings(PrecomputeConfig)):
        if "choices" in settings:
            settings["type"] = click.Choice(settings.pop("choices"))
        command = click.option(*flags, **settings)(command)
    return command


_SETTINGS = {"max_content_width": 120, "help_option_names": ["-h", "--help"]}


@click.command(cls=_Command, context_settings=_SETTINGS)
@click.option("--config", type=click.Path(path_type=Path), help="YAML with any of these options.", metavar="FILE")
@_options
@click.version_option(package_name="offline-kto")
@click.pass_context
def precompute(ctx: click.Context, /, config: Path | None, **values: Any) -> None:
    """Score every labelled and every mismatched completion once under the frozen reference.

    \b
    kto-precompute --model MODEL --data feedback.jsonl --out refs/
    """
    given = {k: v for k, v in values.items() if ctx.get_parameter_source(k) is click.core.ParameterSource.COMMANDLINE}
    resolved = resolve(PrecomputeConfig, given, yaml_path=config)
    for name in ("model", "data"):
        if not getattr(resolved, name):
            raise click.UsageError(f"Missing option '--{name}'.", ctx)
    settle_launch()
    keep_freed_memory()
    quiet_libraries()
    from offline_kto.precompute.run import (
        precompute as run,  # libraries read the environment on import, so it is set up first
    )

    run(resolved, in_own_process=True)


class _Group(click.Group):
    def main(self, *args: Any, **options: Any) -> Any:
        with own_streams():
            return super().main(*args, **options)


@click.group(cls=_Group, context_settings=_SETTINGS)
@click.version_option(package_name="offline-kto")
def cache() -> None:
    """Describe or check a reference cache."""


_FOLDER = click.argument("folder", type=to_location)


@cache.command(cls=_Command)
@_FOLDER
def info(folder: Location) -> None:
    """Print reference, data and settings of a cache, and its number of rows."""
    from offline_kto.precompute.inspect_cache import info as run

    print("\n".join(run(folder)))


@cache.command(cls=_Command)
@_FOLDER
def verify(folder: Location) -> None:
    """Check every file and every row against the manifest and the rules of the format."""
    from offline_kto.precompute.inspect_cache import verify as run

    print(run(folder))


@cache.command(cls=_Command)
@_FOLDER
@click.option("--rows", "-n", default=3, show_default=True, help="Rows to show.")
@click.option("--model", default=None, help="Tokenizer to decode with.  [default: the reference's]", metavar="MODEL")
def head(folder: Location, rows: int, model: str | None) -> None:
    """Show the first rows as text: prompt, completion y and mismatched completions y'."""
    quiet_libraries()
    from offline_kto.precompute.inspect_cache import head as run

    for line in run(folder, rows=rows, model=model):
        print(line)
