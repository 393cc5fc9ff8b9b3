"""Replace the numbers of classes by their names: the datasets library stores a ClassLabel as an index into its names.

The names are in the features of a saved data set, in the metadata of a Parquet file, in a `dataset_infos.json` or
`dataset_info.json` beside the files, or in the card of the data set, README.md. A number whose name is not known becomes a
text that is no label, since 1 may be the name of what is bad.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from offline_kto.kto_core.foreign_files import MEGABYTE, read_foreign
from offline_kto.kto_core.yaml_files import parse_yaml
from offline_kto.precompute.records.text_files import Record

# The key of a Parquet schema's metadata under which the datasets library stores the features.
_METADATA_KEY = b"huggingface"
# The YAML at the beginning of a card.
_FRONT_MATTER = re.compile(r"\A\ufeff?---[ \t]*\r?\n(.*?)^---[ \t]*\r?$", re.DOTALL | re.MULTILINE)
NOTES = ("dataset_infos.json", "dataset_info.json", "README.md")


class ClassNames:
    """The columns of a data set that are numbers of classes.

    The number alone says nothing: with the names ["good", "bad"], 1 is bad.

    Args:
        features: of the datasets library, as `Features.to_dict` returns them.
    """

    def __init__(self, features: Mapping[str, Any]) -> None:
        self._features = {name: one for name, one in features.items() if _has_classes(one)}

    @classmethod
    def of_schema(cls, metadata: Mapping[bytes, bytes] | None) -> "ClassNames":
        """Return the classes that the metadata of a Parquet schema describes."""
        try:
            features = json.loads((metadata or {}).get(_METADATA_KEY, b"{}"))["info"]["features"]
        except (ValueError, KeyError, TypeError, RecursionError):  # written by another program
            return cls({})
        return cls(features if isinstance(features, dict) else {})

    @classmethod
    def beside(cls, path: Path) -> "ClassNames":
        """Return the classes that notes or a card beside a file, or in the two folders above, describe.

        Raises:
            ConfigError: a card that describes classes is not valid YAML.
        """
        found: dict[str, Any] = {}
        for folder in [*path.parents][:3]:
            for column, feature in (one for name in NOTES for one in _features_in(folder / name)):
                if not _has_classes(feature):
                    continue
                if _names_of(found.setdefault(column, feature)) != _names_of(feature):  # which one it is cannot be told
                    found[column] = _without_names(feature)
        return cls(found)

    def record(self, record: Record) -> Record:
        """Return a record with the names of its classes. A negative number means that there is no class."""
        if not self._features:
            return record
        return {name: _named(value, self._features.get(name)) for name, value in record.items()}


def _features_in(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield (column, feature) for each configuration that a file describes."""
    try:
        text = (
            read_foreign(path, most=MEGABYTE).decode("utf-8-sig")
            if path.suffix == ".md"
            else path.read_text("utf-8-sig")
        )
        table = _card(text, path) if path.suffix == ".md" else json.loads(text)
    except (OSError, ValueError, RecursionError):  # there is none, or it belongs to another program
        return
    for info in [table, *table.values()] if isinstance(table, dict) else []:
        features = info.get("features") if isinstance(info, dict) else None
        yield from features.items() if isinstance(features, dict) else ()


def _card(text: str, path: Path) -> dict[str, object]:
    """Return what a card says of each configuration, as `dataset_infos.json` has it."""
    matter = _FRONT_MATTER.match(text)
    if matter is None or "class_label" not in matter[1]:
        return {}
    infos = parse_yaml(matter[1], path).get("dataset_info")
    listed = infos if isinstance(infos, list) else [infos]
    return {
        str(number): {"features": _columns(one.get("features"))}
        for number, one in enumerate(listed)
        if isinstance(one, Mapping)
    }


def _columns(listed: object) -> dict[str, Any]:
    """Return the features of a list of columns in a card."""
    columns = listed if isinstance(listed, list) else []
    return {
        one["name"]: _of_card(one) for one in columns if isinstance(one, Mapping) and isinstance(one.get("name"), str)
    }


def _of_card(entry: object) -> Any:
    """Return the feature of an entry in a card: `dtype`, `struct`, `list` or `sequence`."""
    if isinstance(entry, list):
        return _columns(entry)
    if not isinstance(entry, Mapping):
        return {"_type": "Value"}
    if isinstance(entry.get("class_label"), Mapping):
        names = entry["class_label"].get("names")
        if isinstance(names, Mapping):  # by number, in any order
            numbered = {int(number): name for number, name in names.items() if str(number).isdecimal()}
            names = [numbered.get(number) for number in range(max(numbered, default=-1) + 1)]
        return {"_type": "ClassLabel", "names": names}
    for kind in ("list", "sequence"):
        if kind in entry:
            return {"_type": "List", "feature": _of_card(entry[kind])}
    return _of_card(entry.get("struct", entry.get("dtype")))


def _without_names(feature: Any) -> Any:
    """Return a feature whose classes have no names."""
    if isinstance(feature, Mapping):
        return {key: _without_names(one) for key, one in feature.items() if key != "names"}
    return [_without_names(one) for one in feature] if isinstance(feature, list) else feature


def _names_of(feature: object) -> object:
    """Return the names in a feature and where they are, however the library's version writes it."""
    if isinstance(feature, Mapping) and feature.get("_type") == "ClassLabel":
        return feature.get("names")
    if isinstance(feature, Mapping) and "feature" in feature and "_type" in feature:
        return [_names_of(feature["feature"])]
    if isinstance(feature, Mapping):
        return {key: _names_of(one) for key, one in feature.items() if _has_classes(one)}
    return [_names_of(one) for one in feature] if isinstance(feature, list) else feature


def _has_classes(feature: object) -> bool:
    if isinstance(feature, Mapping):
        return feature.get("_type") == "ClassLabel" or any(map(_has_classes, feature.values()))
    return isinstance(feature, Sequence) and not isinstance(feature, str) and any(map(_has_classes, feature))


def _class(value: object, names: object) -> object:
    """Return the name of a class; a text with its number if it has none."""
    known = [*names] if isinstance(names, Sequence) and not isinstance(names, str) else []
    if isinstance(value, str) and value.isdecimal() and value not in known:  # as CSV has it
        value = int(value)
    if not isinstance(value, int) or isinstance(value, bool):
        return value
    if value < 0:
        return None
    name = known[value] if value < len(known) else None
    return name if isinstance(name, str) else f"class {value} (of unknown name)"


def _named(value: object, feature: object) -> object:
    """Return a value with the names of the classes in it."""
    if isinstance(feature, Mapping) and feature.get("_type") == "ClassLabel":
        return _class(value, feature.get("names"))
    if isinstance(feature, Mapping) and "feature" in feature and "_type" in feature:
        inner = feature["feature"]
        if isinstance(value, Mapping) and isinstance(inner, Mapping):  # a list of objects, stored as columns
            return {key: _each(one, inner.get(key)) for key, one in value.items()}
        return _each(value, inner)
    if isinstance(feature, Mapping) and isinstance(value, Mapping):
        return {key: _named(one, feature.get(key)) for key, one in value.items()}
    if isinstance(feature, list) and len(feature) == 1:
        return _each(value, feature[0])
    return value


def _each(value: object, feature: object) -> object:
    return [_named(one, feature) for one in value] if isinstance(value, list) else value
