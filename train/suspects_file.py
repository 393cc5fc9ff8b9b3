"""Write and read suspects.csv: rows of the feedback that a person should look at, with their places and texts.

People open it in a spreadsheet, and the texts are anybody's: a cell of text that a spreadsheet would run as a formula gets an
apostrophe in front, which reading removes again.
"""

import csv
import io
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Final, NamedTuple

from offline_kto.kto_core.durable_files import replacing
from offline_kto.kto_core.foreign_files import MEGABYTE, read_foreign

# Kinds of suspects, in the order of the file.
CONTRADICTS: Final = "contradicts label"
CONTRADICTION: Final = "contradiction"
DUPLICATE: Final = "duplicate"
CHANGED: Final = "changed most"
KINDS = (CONTRADICTS, CONTRADICTION, DUPLICATE, CHANGED)

# Limits on a file of unknown origin.
_LARGEST, _MOST_ROWS = 64 * MEGABYTE, 10_000

_FORMULA = re.compile(r"'*[=+\-@\t\r]")
_LABELS = {True: "desirable", False: "undesirable"}


class Suspect(NamedTuple):
    """A row of suspects.csv.

    Attributes:
        kind: one of `KINDS`.
        place: of the row in the feedback, such as `feedback.jsonl:12`; `record 12` if the cache has no places.
        label: whether the row is desirable.
        reward: beta times `logratio`; None if the row was never scored, and so are the next two.
        change: of the log-ratio since before training, nats; None if that is not known.
        logratio: of a held-out row under the final policy, of a training row at its last update; nats.
        tokens: of the completion.
        prompt, completion: as the model sees them, with special tokens; long texts without their middle.
        others: places of the other rows of a duplicate or a contradiction.
        split: `train` or `held_out`, as in rewards.parquet; `evaluated` with `--evaluate-only`; empty for a row of neither.
    """

    kind: str
    place: str
    label: bool
    reward: float | None
    change: float | None
    logratio: float | None
    tokens: int
    row_id: str
    prompt: str
    completion: str
    others: str
    split: str


def write_suspects(path: Path, suspects: Sequence[Suspect]) -> None:
    """Write suspects.csv. Raises: OSError: it cannot be written."""
    with replacing(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(Suspect._fields)
        for one in suspects:
            writer.writerow(map(_cell, one._replace(label=_LABELS[one.label])))  # type: ignore[arg-type]


def read_suspects(path: Path) -> list[Suspect]:
    """Read suspects.csv. Its texts are as they were written, and are not to be trusted.

    Raises:
        OSError, ValueError: it cannot be read, or is no such file.
    """
    text = read_foreign(path, most=_LARGEST).decode("utf-8")
    try:
        rows = [*csv.DictReader(io.StringIO(text, newline=""), strict=True)]
    except csv.Error as error:
        raise ValueError(f"not a table: {error}") from error
    if len(rows) > _MOST_ROWS:
        raise ValueError(f"it has {len(rows):,} rows")
    return [_suspect(row) for row in rows]


def _cell(value: object) -> str:
    if isinstance(value, str):
        return f"'{value}" if _FORMULA.match(value) else value
    if isinstance(value, float):
        return f"{value:.6g}"
    return "" if value is None else str(value)


def _text(cell: str) -> str:
    return cell[1:] if cell.startswith("'") and _FORMULA.match(cell) else cell


def _suspect(row: dict[str, str]) -> Suspect:
    if None in row or not set(Suspect._fields) <= row.keys() or None in row.values():
        raise ValueError(f"its columns are not {', '.join(Suspect._fields)}")
    if row["kind"] not in KINDS or row["label"] not in _LABELS.values():
        raise ValueError("a row of unknown kind or label")
    return Suspect(
        kind=row["kind"],
        place=_text(row["place"]),
        label=row["label"] == _LABELS[True],
        reward=_number(row["reward"]),
        change=_number(row["change"]),
        logratio=_number(row["logratio"]),
        tokens=int(row["tokens"]),
        row_id=_text(row["row_id"]),
        prompt=_text(row["prompt"]),
        completion=_text(row["completion"]),
        others=_text(row["others"]),
        split=_text(row["split"]),
    )


def _number(cell: str) -> float | None:
    value = float(cell) if cell else None
    return value if value is None or math.isfinite(value) else None
