"""Build the options of the commands: one frozen dataclass per command has their names, types, defaults and help.

    @dataclass(frozen=True)
    class TrainConfig:
        beta: float = option(0.1, "strength of the pull towards the reference")

The commands build their flags from the fields, and YAML files fill the same fields.
Precedence: command line, then YAML, then the default.
"""

import contextlib
import dataclasses
import json
import math
import numbers
import os
import re
import sys
import types
import typing
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, TypeVar

from offline_kto.kto_core.config_paths import absolute, located
from offline_kto.kto_core.errors import ConfigError, nearest, shown
from offline_kto.kto_core.locations import to_location
from offline_kto.kto_core.yaml_files import named_file, read_yaml

ConfigT = TypeVar("ConfigT")
NumberT = TypeVar("NumberT", int, float)

AUTO = "auto"


def option(
    default: Any,
    help: str,  # noqa: A002 - the word that command lines use
    *,
    choices: tuple[str, ...] | None = None,
    metavar: str | None = None,
    off: str | None = None,
    yaml: bool = True,
    most: float | None = None,
    finite: bool = True,
    may_be_path: Callable[[str], bool] | None = None,
    options_of: type | None = None,
    synonyms: Mapping[str, str] | None = None,
    hint: str = "",
    table: bool = False,
) -> Any:
    """Return a dataclass field that is also a command-line option.

    Args:
        default: value, or a zero-argument factory for a mapping.
        help: one line, shown by `--help`.
        choices: the words allowed.
        metavar: placeholder shown for the value.
        off: the flag that switches a boolean off (`--no-shuffle`).
        yaml: whether a YAML file may set it (paths that name the run itself may not).
        most: the largest number allowed; for a whole number the default is the largest C integer.
        finite: whether a number must be finite.
        may_be_path: of a text that is a path or a name: whether a value can be a path.
        options_of: the command whose options a table holds.
        synonyms: other words for some of the choices.
        hint: what to do if a word is not among the choices.
        table: whether a YAML file may also give a text as a table of its parts; it becomes JSON.
    """
    metadata: dict[str, Any] = {"help": help, "choices": choices, "metavar": metavar, "off": off, "yaml": yaml}
    metadata.update(
        most=most,
        finite=finite,
        may_be_path=may_be_path,
        options_of=options_of,
        hint=f" {hint}" if hint else "",
        table=table,
    )
    metadata["synonyms"] = {word: name for word, name in (synonyms or {}).items() if name in (choices or ())}
    if callable(default):
        return dataclasses.field(default_factory=default, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def folder_or_name(text: str) -> bool:
    """Return that a text may be a path: `may_be_path` of what is a folder here or has that name on the hub."""
    return True


# The other names of types; each option takes those of its choices.
OTHER_NAMES_OF_TYPES = {
    "fp32": "float32",
    "float": "float32",
    "bf16": "bfloat16",
    "fp16": "float16",
    "half": "float16",
}


# Libraries keep counts in C integers: a larger one is a mistake, and would end in their OverflowError.
_MOST = 2**31 - 1


def check_options(config: Any) -> None:
    """Convert each value of a config to its field's type, and check it: for callers from Python as on the command line.

    Text is parsed as on the command line: `beta="0.1"` is a number, `out="runs/x"` a path. Lists become text with
    commas, and tables for text fields become JSON.

    Raises:
        ConfigError: a value of another type, a word that is not a choice, or a number that is NaN, infinite
            or too large.
    """
    kinds = value_types(type(config))
    for field in dataclasses.fields(config):
        value = _given(getattr(config, field.name), kinds[field.name], field)
        object.__setattr__(config, field.name, value)
        if isinstance(value, int | float) and not isinstance(value, bool):
            _check_number(value, kinds[field.name], field)


def _given(value: Any, allowed: tuple[type, ...], field: "dataclasses.Field[Any]") -> Any:
    name, choices = flag(field.name), field.metadata["choices"]
    if value is None and field.default is None:
        return None
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    if isinstance(value, list | tuple) and str in allowed and all(isinstance(one, str) for one in value):
        value = ",".join(value)
    if isinstance(value, Mapping) and str in allowed and dict not in allowed:
        value = json.dumps(value)
    if isinstance(value, str):
        value = field.metadata["synonyms"].get(value, value)
        if choices and value not in choices:
            raise ConfigError(
                f"{name}: got {shown(value)!r}; choose one of {', '.join(choices)}.{nearest(value, list(choices))}"
                f"{field.metadata['hint']}"
            )
        read = _reader(allowed)
        if read is not None:
            with contextlib.suppress(ValueError, OverflowError):
                return read(value)
    elif isinstance(value, bool):
        if bool in allowed:
            return value
    elif isinstance(value, numbers.Real):
        with contextlib.suppress(ValueError):
            return _number_as(value, allowed)
    elif isinstance(value, allowed):
        return value
    # In a field that also takes a number, the only text is the word auto.
    words = {**_WORDS, str: AUTO} if {int, float} & set(allowed) else _WORDS
    wanted = " or ".join(words.get(kind, kind.__name__) for kind in allowed)
    raise ConfigError(f"{name} must be {wanted}, got {shown(repr(value))}.")


def _reader(allowed: tuple[type, ...]) -> Callable[[str], Any] | None:
    """Return the function that parses the text of an option on the command line."""
    if Path in allowed:
        return to_location if str in allowed else Path
    if float in allowed:
        return number_or_auto if str in allowed else float
    if int in allowed:
        return whole_number_or_auto if str in allowed else int
    return str if str in allowed else None


def _number_as(value: Any, allowed: tuple[type, ...]) -> Any:
    """Return a number in the type of a field. Raises: ValueError: no type of the field fits."""
    if float in allowed:
        # A whole number too large for a float stays one; `_check_number` refuses it.
        return value if isinstance(value, int) and abs(value) > sys.float_info.max else float(value)
    if int in allowed:
        if isinstance(value, float) and not math.isfinite(value):
            return value  # `_check_number` refuses it
        if value == int(value):
            return int(value)
    elif allowed == (str,):
        return str(value)
    raise ValueError


def _check_number(value: float, kinds: tuple[type, ...], field: "dataclasses.Field[Any]") -> None:
    if value != value or (value in (float("inf"), float("-inf")) and field.metadata["finite"]):
        raise ConfigError(f"{flag(field.name)} must be a finite number, got {value}.")
    if value in (float("inf"), float("-inf")):
        return
    most = field.metadata["most"] or (sys.float_info.max if float in kinds else _MOST)
    if value > most:
        raise ConfigError(f"{flag(field.name)} must be at most {_plainly(most)}, got {shown(value)}.")
    if value < -sys.float_info.max:
        raise ConfigError(f"{flag(field.name)} must be at least {-sys.float_info.max:g}, got {shown(value)}.")


def _plainly(number: float) -> str:
    return f"{number:,}" if number < 2**65 else f"{number:g}"


def check_table(table: Mapping[str, Any], where: str) -> None:
    """Check the numbers of a table that a library reads, as `check_options` does. Infinity may mean "no limit" there.

    Raises:
        ConfigError: NaN, or a whole number too large for a C integer.
    """
    for name, value in table.items():
        if isinstance(value, dict):
            check_table(value, f"{where} {shown(name)}:")
        elif isinstance(value, float) and value != value:
            raise ConfigError(f"{where} {shown(name)} must be a number, got {value}.")
        elif isinstance(value, int) and not -(2**63) <= value < 2**63:
            raise ConfigError(f"{where} {shown(name)} must be below 2**63, got {shown(value)}.")


def flag(name: str) -> str:
    """Return an option's flag: `learning_rate` -> `--learning-rate`."""
    return "--" + name.replace("_", "-")


def value_types(config: type) -> dict[str, tuple[type, ...]]:
    """Return field name -> the types it takes, without `None` (`float | str` for "auto" or a number)."""
    hints = typing.get_type_hints(config)
    names = [field.name for field in dataclasses.fields(config)]
    return {name: _plain_types(hints[name]) for name in names}


def _plain_types(hint: Any) -> tuple[type, ...]:
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        inner = [arg for arg in typing.get_args(hint) if arg is not type(None)]
        return tuple(plain for arg in inner for plain in _plain_types(arg))
    return (typing.get_origin(hint) or hint,)


def resolve(
    config: type[ConfigT],
    command_line: Mapping[str, Any],
    *,
    yaml_path: Path | None = None,
    foreign: bool = False,
    begun_with: Path | None = None,
) -> ConfigT:
    """Build a config from the command line (given options only), then YAML, then defaults.

    Paths in a YAML are relative to its folder.

    Args:
        foreign: whether the YAML is in an untrusted folder.
        begun_with: YAML of work that is continued, in an untrusted folder; its options come before the defaults.

    Raises:
        ConfigError: an unknown key (with the nearest known one), a value of the wrong type, or one that
            the config itself refuses.
    """
    values = dict(command_line)
    if yaml_path:
        values.update(_yaml_values(config, named_file(yaml_path), foreign, without=values))
    if begun_with:
        values.update(_yaml_values(config, begun_with, foreign=True, without={*values, *ASKED_AGAIN}))
    return config(**values)


def value_in_yaml(config: type, yaml_path: Path, name: str) -> Any:
    """Return the checked value of one option in a YAML file; None if it is not there. Raises: ConfigError: as `resolve`."""
    return _yaml_values(config, named_file(yaml_path), foreign=False, without=()).get(name)


# Options that work in an untrusted folder cannot set: whoever continues it has to give them again.
ASKED_AGAIN = frozenset({"trust_remote_code"})


def _yaml_values(config: type, path: Path, foreign: bool, *, without: Collection[str]) -> dict[str, Any]:
    """Return the checked values of a YAML file, without those of options that are given elsewhere."""
    values = checked_values(config, read_yaml(path, foreign=foreign), str(path))
    return _located(config, {name: value for name, value in values.items() if name not in without}, path)


def _located(config: type, values: Mapping[str, Any], path: Path) -> dict[str, Any]:
    def change(value: Any, key: str, or_name: bool) -> Any:
        return located(value, path.parent, where=f"{path}: {key}", or_name=or_name)

    return _with_paths(config, values, change)


def with_absolute_paths(config: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return values of options for a file that may be read from any folder: their paths are absolute."""
    return _with_paths(config, values, lambda value, _, or_name: absolute(value, or_name=or_name))


def _with_paths(config: type, values: Mapping[str, Any], change: Callable[[Any, str, bool], Any]) -> dict[str, Any]:
    """Return values of options with `change(path, key, or_name)` for each path, also in tables of other options."""
    fields, kinds = {field.name: field for field in dataclasses.fields(config)}, value_types(config)

    def changed(value: Any, key: str) -> Any:
        field = fields.get(key.replace("-", "_"))
        metadata = {} if field is None else field.metadata
        if field is None or value is None:
            return value
        if metadata.get("options_of") and isinstance(value, Mapping):
            return _with_paths(metadata["options_of"], value, change)
        if isinstance(value, list):  # values of a search
            return [changed(one, key) for one in value]
        may_be_path = metadata.get("may_be_path")
        is_path = Path in kinds[field.name]
        if not isinstance(value, str | Path) or not (is_path or (may_be_path and may_be_path(str(value)))):
            return value
        return change(value, key, not is_path)

    return {key: changed(value, shown(key)) for key, value in values.items()}


def checked_values(config: type, table: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return values for a config's fields from a table that a user wrote.

    Args:
        where: the file, and the table in it, for messages.

    Raises:
        ConfigError: an unknown key (with the nearest known one), or a value of the wrong type.
    """
    fields = {field.name: field for field in dataclasses.fields(config)}
    known = [name for name, field in fields.items() if field.metadata.get("yaml", True)]
    values = {}
    for key, value in table.items():
        name = shown(key).replace("-", "_")
        if name not in known:
            if name in fields:
                raise ConfigError(f"{where}: {shown(key)!r} belongs on the command line: {flag(name)} ...")
            raise ConfigError(
                f"{where}: unknown key {shown(key)!r}.{nearest(name, known)} Known keys: {', '.join(known)}."
            )
        values[name] = _coerce(value, value_types(config)[name], f"{where}: {shown(key)}", fields[name])
    return values


def _coerce(value: Any, allowed: tuple[type, ...], where: str, field: "dataclasses.Field[Any]") -> Any:
    """Return a YAML value in a field's type, without guessing: "true" is not True, 1.5 is not an int."""
    if value is None:
        if field.default is None:
            return None
        default = "" if field.default is dataclasses.MISSING else f" to use {field.default!r}"
        raise ConfigError(f"{where}: has no value. Give one, or delete the line{default}.")
    if isinstance(value, bool):
        if bool in allowed:
            return value
    elif isinstance(value, int | float):
        if int in allowed and -(2**63) <= value < 2**63 and value == int(value):
            return int(value)
        if float in allowed and (isinstance(value, float) or abs(value) <= sys.float_info.max):
            return float(value)
    elif isinstance(value, str):
        choices = field.metadata.get("choices")
        value = field.metadata.get("synonyms", {}).get(value, value)
        if choices and value not in choices:
            raise ConfigError(
                f"{where}: got {shown(value)!r}; choose one of {', '.join(choices)}.{nearest(value, list(choices))}"
            )
        if Path in allowed:
            return to_location(value) if str in allowed else Path(value)
        if str in allowed:
            reader = _reader(allowed)
            assert reader is not None
            with contextlib.suppress(ValueError, OverflowError):
                return reader(value)  # where a word may stand, a number in quotes is a number
            return value
    elif isinstance(value, list) and tuple in allowed:
        return tuple(value)
    elif isinstance(value, dict) and dict in allowed:
        return value
    elif isinstance(value, dict) and field.metadata.get("table"):
        return json.dumps({str(key): one for key, one in value.items()}, default=str)
    wanted = " or ".join(_WORDS.get(kind, kind.__name__) for kind in allowed)
    raise ConfigError(f"{where}: expected {wanted}, got {as_given(value, allowed)}")


def as_given(value: object, allowed: tuple[type, ...]) -> str:
    """Return a refused value for the end of a message; for a number written as text, with the way to write it.

    Args:
        allowed: types that the option takes.
    """
    if not isinstance(value, str):
        return f"{shown(value)}."
    kind = next((kind for kind in (float, int) if kind in allowed), None)
    if kind is not None:
        with contextlib.suppress(ValueError):
            return f"{shown(value)!r}. Write it without quotes: {kind(value)}"
    return f"{shown(value)!r}."


_WORDS = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    Path: "a path",
    dict: "a table",
    tuple: "a list",
}


def as_plain(config: Any) -> dict[str, Any]:
    """Return a config as values for JSON and YAML, in field order."""
    return {field.name: _plain(getattr(config, field.name)) for field in dataclasses.fields(config)}


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, tuple):
        return list(value)
    return value


def parse_settings(text: str | None, name: str) -> dict[str, Any]:
    """Return named values from an option: a JSON object, or `NAME=VALUE,NAME=VALUE` with JSON values or words.

    Args:
        name: of the option, for messages.

    Raises:
        ConfigError: neither, or an invalid name.
    """
    if text is None:
        return {}
    example = f'{name}: expected NAME=VALUE or a JSON object like {{"enable_thinking": false}}, got {shown(text)!r}.'
    try:
        if text.strip().startswith("{"):
            values = json.loads(text, parse_constant=_no_constant)
        else:
            values = {}
            for part in filter(str.strip, text.split(",")):
                key, equals, value = part.partition("=")
                if not equals:
                    raise ConfigError(example)
                values[key.strip()] = _value(value.strip())
    except (ValueError, RecursionError) as error:
        raise ConfigError(example) from error
    wrong = [key for key in values if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]{0,99}", key)]
    if wrong:
        raise ConfigError(f"{name}: {shown(wrong[0])!r} is not a name of a setting.")
    return dict(values)


def _value(text: str) -> Any:
    try:
        return json.loads(text, parse_constant=_no_constant)
    except ValueError:
        return {"True": True, "False": False}.get(text, text)


def _no_constant(text: str) -> Any:
    raise ValueError(f"{text} is not a JSON value")


def click_settings(config: type) -> list[tuple[list[str], dict[str, Any]]]:
    """Return, for each field, the flags and keyword arguments of `click.option` (which this package never imports).

    The caller turns a `choices` entry into `click.Choice`.
    """
    settings = []
    kinds = value_types(config)
    for field in dataclasses.fields(config):
        kind, metadata = kinds[field.name], field.metadata
        if dict in kind:  # tables can only be set in YAML
            continue
        default = field.default
        shown = default is not None and not isinstance(default, bool) and default not in ("", Path(""))
        one: dict[str, Any] = {"help": _help(field), "default": default, "show_default": shown}
        flags = [flag(field.name)]
        if bool in kind:
            flags = [f"{flags[0]}/{metadata['off']}"] if metadata["off"] else flags
            one.update(is_flag=True, show_default=bool(metadata["off"]))
        elif float in kind and str in kind:
            one["type"] = number_or_auto
            one["metavar"] = "FLOAT|auto"
        elif int in kind and str in kind:
            one["type"] = whole_number_or_auto
            one["metavar"] = "N|auto"
        elif Path in kind and str in kind:
            one["type"] = to_location
        elif metadata["choices"]:
            one["choices"] = [*metadata["choices"], *metadata["synonyms"]]
            one["metavar"] = f"[{'|'.join(metadata['choices'])}]"
            if metadata["hint"]:
                one["hint"] = metadata["hint"]
        else:
            one["type"] = kind[0]
        if metadata["metavar"]:
            one["metavar"] = metadata["metavar"]
        settings.append((flags, one))
    return settings


def _help(field: "dataclasses.Field[Any]") -> str:
    """Return the help text, with defaults that click does not show by itself."""
    text: str = field.metadata["help"]
    if "[default:" in text or field.default in ("", Path("")):
        return text
    if field.default is None:
        return f"{text}  [default: none]"
    if field.default is False and not field.metadata["off"]:
        return f"{text}  [default: off]"
    return text


def number_or_auto(text: Any) -> float | str:
    """Return `auto`, or a number.

    Raises:
        ValueError: neither.
    """
    return _or_auto(text, float)


def whole_number_or_auto(text: Any) -> int | str:
    """Return `auto`, or a whole number.

    Raises:
        ValueError: neither.
    """
    return _or_auto(text, int)


def _or_auto(text: Any, kind: type[NumberT]) -> NumberT | str:
    if text == AUTO:
        return AUTO
    try:
        return kind(text)
    except (TypeError, ValueError):
        raise ValueError(f"{text!r} is neither {_WORDS[kind]} nor 'auto'") from None
