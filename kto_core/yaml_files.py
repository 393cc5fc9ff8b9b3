"""Read YAML files safely: duplicate keys are refused, `1e-6` is a number, and `1:5` is text."""

import re
from pathlib import Path

import yaml

from offline_kto.kto_core.errors import ConfigError, printable, said_by
from offline_kto.kto_core.foreign_files import MEGABYTE, read_foreign


class _Loader(yaml.SafeLoader):
    """A safe YAML loader in which `1e-6` is a number and `1:5` is text, as in YAML 1.2."""

    _references = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        """Compose a node, and refuse many references: nested ones can grow without bound, and a config needs few."""
        if self.check_event(yaml.AliasEvent):
            self._references += 1
            if self._references > _MOST_REFERENCES:
                raise yaml.composer.ComposerError(
                    None, None, f"more than {_MOST_REFERENCES} references (*name)", self.peek_event().start_mark
                )
        return super().compose_node(parent, index)


_MOST_REFERENCES = 20


def _no_duplicates(loader: _Loader, node: yaml.MappingNode, deep: bool = False) -> dict[object, object]:
    seen: dict[object, object] = {}
    for key_node, _ in node.value:
        if not isinstance(key_node, yaml.ScalarNode) or key_node.tag == "tag:yaml.org,2002:merge":
            continue
        # `max-steps` and `max_steps` name one option.
        key = key_node.value.replace("-", "_")
        if key in seen:
            line = key_node.start_mark.line + 1
            raise ConfigError(
                f"{key_node.start_mark.name}:{line}: {key_node.value!r} is given twice; keep one of them."
            )
        seen[key] = True
    loader.flatten_mapping(node)
    return yaml.SafeLoader.construct_mapping(loader, node, deep)


_INT, _FLOAT = "tag:yaml.org,2002:int", "tag:yaml.org,2002:float"
# Without the numbers of YAML 1.1 to the base 60: `1:5` is text.
_Loader.yaml_implicit_resolvers = {
    mark: [(tag, pattern) for tag, pattern in resolvers if tag not in (_INT, _FLOAT)]
    for mark, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    _INT, re.compile(r"^[-+]?(0b[01_]+|0x[0-9a-fA-F_]+|0[0-7_]*|[1-9][0-9_]*)$"), list("-+0123456789")
)
_Loader.add_implicit_resolver(
    _FLOAT,
    re.compile(r"^[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?$|^[-+]?\.(inf|Inf|INF)$|^\.(nan|NaN|NAN)$"),
    list("-+0123456789."),
)
_Loader.add_constructor("tag:yaml.org,2002:map", _no_duplicates)


# Configurations that come with the package.
_SHIPPED = Path(__file__).parents[1] / "configs"


def named_file(path: Path) -> Path:
    """Return the file for `--config`: the user's, or one that comes with the package (`--config lora`)."""
    shipped = _SHIPPED / f"{path}.yaml"
    return shipped if len(path.parts) == 1 and not path.exists() and shipped.exists() else path


def read_yaml(path: Path, *, foreign: bool = False) -> dict[str, object]:
    """Return the mapping in a YAML file.

    Args:
        foreign: whether it is in an untrusted folder; see `offline_kto.kto_core.foreign_files`.

    Raises:
        ConfigError: no such file, not YAML, or not a mapping.
    """
    try:
        text = read_foreign(path, most=MEGABYTE).decode("utf-8") if foreign else path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        names = ", ".join(sorted(one.stem for one in _SHIPPED.glob("*.yaml") if not one.stem.startswith("accelerate")))
        hint = "" if foreign or path.exists() else f" Files that come with the package are given by name: {names}."
        raise ConfigError(f"{path}: cannot be read: {error}.{hint}") from error
    return parse_yaml(text, path)


def parse_yaml(text: str, path: Path) -> dict[str, object]:
    """Return the mapping in a YAML text.

    Args:
        path: of its file, for errors.

    Raises:
        ConfigError: not YAML, or not a mapping.
    """
    try:
        loader = _Loader(text)
        loader.name = str(path)
        try:
            content = loader.get_single_data()
        finally:
            loader.dispose()
    except (ValueError, LookupError, AttributeError, OverflowError, RecursionError) as error:
        # PyYAML raises these for an invalid date, for a tag that does not match its value, and so on.
        raise ConfigError(f"{path}: not valid YAML: {said_by(error)}.") from error
    except yaml.YAMLError as error:
        where = getattr(error, "problem_mark", None)
        line = f":{where.line + 1}" if where else ""
        problem = printable(getattr(error, "problem", None) or str(error).splitlines()[0], 200)
        raise ConfigError(f"{path}{line}: not valid YAML: {problem}.") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(
            f"{path}: expected `option: value` lines, found a {type(content).__name__}. See configs/ for examples."
        )
    return content
