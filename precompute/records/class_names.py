"""Replace the numbers of classes by their names: the datasets library stores a ClassLabel as an index into its names."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from offline_kto.precompute.records.text_files import Record

# The key of a Parquet schema's metadata under which the datasets library stores the features.
_METADATA_KEY = b"huggingface"


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
        """Return the classes that a `dataset_infos.json` beside a file, or in the folder above, describes.

        Columns that its configurations describe differently are left as they are.
        """
        found: dict[str, Any] = {}
        differ: set[str] = set()
        for name in ("dataset_infos.json", "dataset_info.json"):
            for folder in (path.parent, path.parent.parent):
                for column, feature in _features_in(folder / name):
                    if _has_classes(feature) and _names_of(found.setdefault(column, feature)) != _names_of(feature):
                        differ.add(column)
        return cls({column: feature for column, feature in found.items() if column not in differ})

    def record(self, record: Record) -> Record:
        """Return a record with the names of its classes. A negative number means that there is no class."""
        if not self._features:
            return record
        return {name: _named(value, self._features.get(name)) for name, value in record.items()}


def _features_in(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield (column, feature) for each configuration in a file of the datasets library."""
    try:
        table = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError):  # there is none, or it belongs to another program
        return
    for info in [table, *table.values()] if isinstance(table, dict) else []:
        features = info.get("features") if isinstance(info, dict) else None
        yield from features.items() if isinstance(features, dict) else ()


def _names_of(feature: object) -> object:
    """Return a feature without keys that differ between versions of the library."""
    if isinstance(feature, Mapping):
        return {key: _names_of(one) for key, one in feature.items() if key not in ("id", "num_classes")}
    return [_names_of(one) for one in feature] if isinstance(feature, list) else feature


def _has_classes(feature: object) -> bool:
    if isinstance(feature, Mapping):
        return feature.get("_type") == "ClassLabel" or any(map(_has_classes, feature.values()))
    return isinstance(feature, Sequence) and not isinstance(feature, str) and any(map(_has_classes, feature))


def _named(value: object, feature: object) -> object:
    """Return a value with the names of the classes in it."""
    if isinstance(feature, Mapping) and feature.get("_type") == "ClassLabel":
        names = feature.get("names")
        if not isinstance(names, Sequence):
            return value
        if isinstance(value, str) and value.isdecimal() and value not in names:  # as CSV has it
            value = int(value)
        if not isinstance(value, int) or isinstance(value, bool) or value >= len(names):
            return value
        return names[value] if value >= 0 else None
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
