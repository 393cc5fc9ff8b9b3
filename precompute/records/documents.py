"""Find the records in a JSON file that is one object: a list under one of its keys, or a table of pandas.

    {"traces": [{...}, {...}], "total": 2}                          the only list of objects
    {"data": {"items": [{...}]}}                                    also one level deeper
    {"prompt": {"0": "...", "1": "..."}, "label": {"0": ...}}       DataFrame.to_json()
    {"columns": [...], "index": [...], "data": [[...], ...]}        DataFrame.to_json(orient="split")
    {"0": {"prompt": "..."}, "1": {...}}                            DataFrame.to_json(orient="index")
    {"prompt": ["...", "..."], "label": [true, false]}              Dataset.to_dict()
    {"features": [...], "rows": [{"row_idx": 0, "row": {...}}]}     the hub's viewer of data sets
    {"train": [{...}], "test": [{...}]}                             the lists of splits, of which one is read

Whether an object is a record itself is for the caller to decide.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from offline_kto.kto_core.errors import FeedbackError
from offline_kto.kto_core.feedback.quoting import quoted
from offline_kto.precompute.records.dataset_records import is_split_name, no_split
from offline_kto.precompute.records.text_files import Record


@dataclass(frozen=True)
class Records:
    """The records in a document.

    Attributes:
        place: where they were found, for the plan: "under 'traces'".
        of_split: whether they are those of one split of several.
    """

    place: str
    records: list[Record]
    of_split: bool = False


def records_in(document: Record, where: str, split: str) -> Records | None:
    """Return the records in an object; None if there are none.

    Args:
        split: which list is read if each is a split.

    Raises:
        FeedbackError: several lists; no list of the split; a table whose rows have different lengths.
    """
    return pandas_table(document, where) or columns_in(document) or _viewer(document) or _list(document, where, split)


def pandas_table(document: Record, where: str) -> Records | None:
    """Return the records of a table of pandas, which no record resembles: its columns may have the names of any format's."""
    return _split_table(document, where) or _table(document)


def _split_table(document: Record, where: str) -> Records | None:
    columns, rows = document.get("columns"), document.get("data")
    if not isinstance(columns, list) or not isinstance(rows, list) or not all(isinstance(one, str) for one in columns):
        return None
    if not all(isinstance(row, list) for row in rows):
        return None
    for number, row in enumerate(rows, 1):
        if len(row) != len(columns):
            raise FeedbackError(f"{where} (record {number}): {len(row)} values under {len(columns)} columns.")
    return Records("as a table of pandas (split)", [dict(zip(columns, row, strict=True)) for row in rows])


def _table(document: Record) -> Records | None:
    inner = list(document.values())
    if not inner or not all(isinstance(one, Mapping) and one for one in inner):
        return None
    columns = {name: dict(value) for name, value in document.items() if isinstance(value, Mapping)}
    if all(name.isdecimal() for name in columns):
        return Records("as a table of pandas (index)", list(columns.values()))
    index = list(next(iter(columns.values())))
    if all(name.isdecimal() for name in index) and all(list(column) == index for column in columns.values()):
        rows = [{name: column[row] for name, column in columns.items()} for row in index]
        return Records("as a table of pandas (columns)", rows)
    return None


def columns_in(document: Record) -> Records | None:
    """Return the records of columns that are lists. A list of objects may be one conversation, so it is no column."""
    columns = {name: value for name, value in document.items() if isinstance(value, list)}
    sizes = {len(value) for value in columns.values()}
    if len(columns) < max(2, len(document)) or len(sizes) != 1 or sizes == {0}:
        return None
    if any(isinstance(one, Mapping) for value in columns.values() for one in value):
        return None
    rows = zip(*columns.values(), strict=True)
    return Records("as a table of columns", [dict(zip(columns, row, strict=True)) for row in rows])


def _viewer(document: Record) -> Records | None:
    rows = document.get("rows")
    if not isinstance(rows, list) or not rows:
        return None
    inner = [one.get("row") if isinstance(one, dict) else None for one in rows]
    records = [one for one in inner if isinstance(one, dict)]
    return Records('under "rows"', records) if len(records) == len(rows) else None


def _list(document: Record, where: str, split: str) -> Records | None:
    found = {key: value for key, value in document.items() if _is_list(value)}
    if not found:
        deeper = {f"{outer}.{key}": value for outer, key, value in _inner(document) if _is_list(value)}
        found = deeper
    if len(found) > 1 and all(is_split_name(key.rpartition(".")[2]) for key in found):
        return _of_split(found, where, split)
    if len(found) > 1:
        sizes = ", ".join(f"{quoted(key)} ({len(value):,})" for key, value in found.items() if isinstance(value, list))
        raise FeedbackError(
            f"{where}: one object with several lists: {sizes}. Choose one with "
            f"`records: {next(iter(found))}` in a mapping (--map FILE), or save that list alone."
        )
    for key, value in found.items():
        assert isinstance(value, list)
        return Records(f"under {quoted(key)}", value)
    return None


def _of_split(lists: Mapping[str, object], where: str, split: str) -> Records:
    """Return the records of a split, or of all. Raises: FeedbackError: there is no such split."""
    by_name = {key.rpartition(".")[2].lower(): (key, value) for key, value in lists.items()}
    if split.lower() == "all":
        records = [one for _, value in by_name.values() if isinstance(value, list) for one in value]
        return Records(f"under {', '.join(map(quoted, lists))}", records)
    if split.lower() not in by_name:
        raise no_split(where, split, by_name)
    key, value = by_name[split.lower()]
    assert isinstance(value, list)
    return Records(f"under {quoted(key)}; --split chooses among {', '.join(by_name)}", value, of_split=True)


def _inner(document: Record) -> list[tuple[str, str, object]]:
    return [
        (outer, key, item)
        for outer, value in document.items()
        if isinstance(value, Mapping)
        for key, item in value.items()
    ]


def _is_list(value: object) -> bool:
    return isinstance(value, list) and len(value) > 0 and all(isinstance(one, dict) for one in value)
