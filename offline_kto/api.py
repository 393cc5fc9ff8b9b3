"""The Python API that `offline_kto` exports. Each function is one command, or one of its steps."""

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar, overload

from offline_kto.kto_core.console import LOGGER, shown_lines
from offline_kto.kto_core.errors import ConfigError, nearest, shown
from offline_kto.kto_core.locations import Location, to_location
from offline_kto.kto_core.options import resolve
from offline_kto.kto_core.runtime import quiet_loggers

if TYPE_CHECKING:
    import datasets

    from offline_kto.kto_core.cache.manifest import Manifest
    from offline_kto.train.config import TrainConfig
    from offline_kto.train.data.cache_rows import CacheRows
    from offline_kto.train.report.folders import Run, Sweep

ConfigT = TypeVar("ConfigT")


def precompute(
    model: str | Path | None = None, data: str | Path | None = None, out: Location | None = None, **options: Any
) -> "Manifest | None":
    """Score feedback under a reference model, once, as `kto-precompute` does.

    An argument that is not given may be in the YAML file that `config` names.

    Args:
        model: the reference, a local folder or a hub id. Not a loaded model: a cache is identified by the files it
            was scored with.
        data: feedback, a file, a dataset folder or a hub id.
        out: folder of the cache, or its URL; refs by default.
        options: of `PrecomputeConfig`; `config` may name a YAML file with more.

    Returns:
        The manifest of the cache; None with `dry_run=True`, which writes none.

    Raises:
        KTOError: the input cannot be used.
    """
    from offline_kto.precompute.config import PrecomputeConfig

    _refuse_objects(model=model, data=data, config=options.get("config"))
    config = _config(PrecomputeConfig, {**_given(model=model, data=data, out=out), **options})
    with _shown():
        from offline_kto.kto_core.cache.manifest import read_manifest
        from offline_kto.kto_core.cache.remote_cache import local_copy
        from offline_kto.precompute.run import precompute as run

        run(config)
        return None if config.dry_run else read_manifest(local_copy(config.out))


@overload
def train(
    cache: Location | None = None, out: str | Path | None = None, *, dry_run: Literal[False] = False, **options: Any
) -> "Run": ...


@overload
def train(
    cache: Location | None = None, out: str | Path | None = None, *, dry_run: Literal[True], **options: Any
) -> None: ...


def train(
    cache: Location | None = None, out: str | Path | None = None, *, dry_run: bool = False, **options: Any
) -> "Run | None":
    """Train a policy from cached reference scores, as `kto-train` does.

    Args:
        cache: the reference cache, a folder or its URL; it may be in the YAML file that `config` names instead.
        out: the run folder; None for a folder in runs/ named by the time.
        dry_run: whether to stop after the plan, with nothing trained and nothing written.
        options: of `TrainConfig`; `config` may name a YAML file with more. `training` is a table for
            `transformers.TrainingArguments`.
            With `evaluate_only`, a run folder, nothing is trained and the options are those of that run.

    Returns:
        The finished run: options, metrics, evaluation. Its model is in `path`. None with `dry_run`.

    Raises:
        KTOError: the input cannot be used, training was stopped, or a finished run could not be uploaded (`push_to_hub`): its folder
            is complete then, and `read` reads it.
    """
    from offline_kto.train.config import TrainConfig

    _refuse_objects(model=options.get("model"), cache=cache, config=options.get("config"))
    given = {**_given(cache=cache, out=out), **({"dry_run": True} if dry_run else {}), **options}
    config = _config(TrainConfig, given) if given.get("evaluate_only") is None else _of_run(given)
    with _shown():
        from offline_kto.train.run.train_run import train as run

        folder = run(config)
        return None if dry_run else _run_in(folder)


def sweep(
    cache: Location | None = None,
    space: Mapping[str, Any] | None = None,
    out: str | Path | None = None,
    **options: Any,
) -> "Sweep":
    """Train many trials from one cache, as `kto-sweep` does.

    Cache and space may be in the YAML file that `config` names instead.

    Args:
        cache: the reference cache, a folder or its URL.
        space: option of `TrainConfig` -> list of values, or {"low": ..., "high": ..., "log": ...}.
        out: the sweep folder; None for a folder in sweeps/ named by the time.
        options: of `SweepConfig`; `train` is a table of options shared by all trials. `config` may name a YAML file with
            more.

    Returns:
        All trials, and the best one.

    Raises:
        KTOError: the input cannot be used.
    """
    from offline_kto.train.sweep.config import SweepConfig

    _refuse_objects(cache=cache, config=options.get("config"))
    if space is not None:
        if not isinstance(space, Mapping):
            raise ConfigError(f"space must be a mapping of options to values or ranges, got {shown(repr(space))}.")
        space = {name: list(one) if isinstance(one, tuple) else one for name, one in space.items()}
    of_yaml = "config" in options and space is None and "train" not in options
    yaml_path = Path(options["config"]) if of_yaml else None
    config = _config(SweepConfig, {**_given(cache=cache, space=space, out=out), **options})
    with _shown():
        from offline_kto.train.report.folders import Sweep, read_folder
        from offline_kto.train.sweep.sweep import sweep as run

        found = read_folder(run(config, yaml_path=yaml_path))
        assert isinstance(found, Sweep)
        return found


def report(*folders: "str | Path | Run | Sweep", out: str | Path | None = None) -> Path:
    """Write an HTML page about runs and sweeps, as `kto-report` does; return its path.

    Raises:
        KTOError: a folder is neither a run nor a sweep.
    """
    from offline_kto.train.report.report import write_report

    paths: list[Any] = [getattr(folder, "path", folder) for folder in folders]
    for path in paths:
        _refuse_objects(folder=path, needed=True)
    return write_report([Path(path) for path in paths], None if out is None else Path(out))


def read(folder: str | Path) -> "Run | Sweep":
    """Read a run or a sweep folder.

    Raises:
        KTOError: it is neither.
    """
    from offline_kto.train.report.folders import read_folder

    _refuse_objects(folder=folder, needed=True)
    return read_folder(Path(folder))


def open_cache(location: Location, *, max_length: int | None = None) -> "CacheRows":
    """Open a reference cache and check every byte of it.

    Args:
        location: its folder or URL.
        max_length: truncate rows to this many tokens; scores are those of the truncated rows.

    Returns:
        A `torch` dataset of `TrainingRow`: prompt and completion ids, label, reference scores.

    Raises:
        KTOError: the cache is damaged, incomplete or missing.
    """
    from offline_kto.train.data.training_data import open_cache as opened

    _refuse_objects(location=location, needed=True)
    return opened(to_location(location), max_length)


def verify(location: Location) -> "Manifest":
    """Check every file and every row of a cache, as `kto-cache verify` does; return its manifest.

    Raises:
        KTOError: naming the file and what is wrong with it.
    """
    from offline_kto.kto_core.cache.manifest import read_manifest
    from offline_kto.kto_core.cache.remote_cache import local_copy, speaking_of
    from offline_kto.kto_core.cache.verification import verify_cache

    folder = local_copy(to_location(location), anew=True)
    manifest = read_manifest(folder)
    with speaking_of(to_location(location), folder):
        verify_cache(folder, manifest)
    return manifest


def to_trl(location: Location, *, partner: int = 0) -> "datasets.Dataset":
    """Return a cache's rows in the columns that TRL's `KTOTrainer` creates from a data set and its reference pass.

    Args:
        location: the cache, its folder or URL.
        partner: which mismatched completion of each row, counted from 0.

    Returns:
        Columns `prompt_ids`, `completion_ids`, `KL_completion_ids`, `label`, `ref_logps`, `ref_KL_logps` (nats).

    Raises:
        KTOError: no usable cache, or no such mismatched completion.
    """
    from offline_kto.train.data.trl_rows import trl_rows

    return trl_rows(open_cache(location), partner=partner)


# The function of each command's options.
_CALLS = {"PrecomputeConfig": "precompute", "TrainConfig": "train", "SweepConfig": "sweep"}


def _given(**arguments: Any) -> dict[str, Any]:
    """Return the arguments that are not None; the others come from a YAML file or have defaults."""
    return {name: value for name, value in arguments.items() if value is not None}


def _config(kind: type[ConfigT], options: dict[str, Any]) -> ConfigT:
    """Return a command's options from keyword arguments, then a YAML file, then defaults."""
    yaml_path = options.pop("config", None)
    known = [field.name for field in dataclasses.fields(kind)]  # type: ignore[arg-type]
    for name in options:
        if name not in known:
            raise ConfigError(
                f"{kind.__name__} has no option {shown(name)!r}.{nearest(name, known)} Known: {', '.join(known)}."
            )
    from offline_kto.train.run_files import begun_with

    path = None if yaml_path is None else Path(yaml_path)
    return resolve(kind, options, yaml_path=path, begun_with=begun_with(options, path))


def _of_run(given: dict[str, Any]) -> "TrainConfig":
    """Return the options of the run that `evaluate_only` names, with those of the evaluation."""
    from offline_kto.train.config import OF_EVALUATION, TrainConfig
    from offline_kto.train.run_files import CONFIG, check_is_run

    others = sorted(set(given) - OF_EVALUATION)
    if others:
        raise ConfigError(f"evaluate_only takes the run's own options; leave {shown(others[0])} out.")
    _refuse_objects(evaluate_only=given["evaluate_only"])
    run = Path(given["evaluate_only"])
    check_is_run(run, "evaluate_only")
    return resolve(TrainConfig, given, yaml_path=run / CONFIG, foreign=True)


def _refuse_objects(*, needed: bool = False, **arguments: Any) -> None:
    for name, value in arguments.items():
        if dataclasses.is_dataclass(value) and type(value).__name__ in _CALLS:
            raise ConfigError(
                f"{name}: got a {type(value).__name__}, but options are given by name: "
                f"kto.{_CALLS[type(value).__name__]}(**vars(config))."
            )
        if not isinstance(value, str | Path) and (needed or value is not None):
            raise ConfigError(
                f"{name} must be a path or a hub id, got a {type(value).__name__}. A cache is identified by the files it was "
                "computed from: save the object (save_pretrained, or a JSONL file) and give its path."
                if name in ("model", "data")
                else f"{name} must be a path, got a {type(value).__name__}."
            )


def _run_in(folder: Path) -> "Run":
    from offline_kto.train.report.folders import Run, read_folder

    found = read_folder(folder)
    assert isinstance(found, Run)
    return found


@contextlib.contextmanager
def _shown() -> Iterator[None]:
    """Print log lines as the commands do, unless the program has set up `logging` for them."""
    quiet_loggers()
    if LOGGER.hasHandlers():
        yield
        return
    with shown_lines():
        yield
