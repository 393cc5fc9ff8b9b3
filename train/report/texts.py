"""Read the texts of a run for its report page: sampled completions, suspect rows."""

import csv
import io
import json
import re
import unicodedata
from dataclasses import dataclass
from pathlib import Path

from offline_kto.kto_core.errors import said_by
from offline_kto.kto_core.foreign_files import read_foreign
from offline_kto.kto_core.redaction import hidden
from offline_kto.train.report.folders import number
from offline_kto.train.run_files import LARGEST_JSON

SAMPLES, SUSPECTS = "samples.jsonl", "suspects.csv"
MOST_SAMPLES, MOST_SUSPECTS = 100, 25  # prompts; rows of each kind
_LONGEST, _LONGEST_OF_SUSPECT = 20_000, 2_000  # characters of one text
_SNIPPET = 110
_KINDS = ("contradicts label", "contradiction", "duplicate", "changed most")
_PROTECTED = re.compile(r"'+[=+\-@\t\r]")  # an apostrophe keeps a spreadsheet from running a cell
_KEPT = "\n\t\u200c\u200d"  # line breaks, and the joiners that scripts and emoji need


@dataclass(frozen=True)
class Reply:
    """A completion at one step; `ended` is false if it was cut at its budget of tokens."""

    step: int
    text: str
    ended: bool
    tokens: int | None


@dataclass(frozen=True)
class Sample:
    """A held-out prompt and its completions, the first before training and the last of the saved model."""

    prompt: str
    replies: tuple[Reply, ...]


@dataclass(frozen=True)
class Suspect:
    """A row of the feedback that should be looked at."""

    kind: str
    place: str
    label: str
    reward: float | None
    change: float | None
    prompt: str
    completion: str
    others: str

    @property
    def snippet(self) -> str:
        """The beginning of the completion, on one line."""
        text = " ".join(self.completion.split())
        return text if len(text) <= _SNIPPET else text[: _SNIPPET - 1] + "…"


def readable(text: object, most: int = _LONGEST) -> str:
    """Return text of a file to be shown: no secrets, no character that is invisible or changes the order of others."""
    text = str(text if text is not None else "")
    shown = "".join(map(_visible, hidden(text[:most])))
    return shown + (f" … ({len(text) - most:,} more characters)" if len(text) > most else "")


def _visible(character: str) -> str:
    if character.isprintable() or character in _KEPT or unicodedata.category(character) == "Zs":
        return character
    return character.encode("unicode_escape").decode("ascii")


def read_samples(folder: Path, notes: list[str]) -> list[Sample]:
    """Read samples.jsonl, in the file's order; add a note about what cannot be read."""
    prompts: dict[str, str] = {}
    replies: dict[str, dict[int, Reply]] = {}
    for record in _sample_records(folder, notes):
        key, step, tokens = str(record.get("prompt_id")), record["step"], number(record.get("tokens"))
        reply = Reply(
            step=int(str(step)),
            text=readable(record.get("completion")),
            ended=record.get("ended") is not False,
            tokens=None if tokens is None else int(tokens),
        )
        prompts.setdefault(key, readable(record.get("prompt")))
        replies.setdefault(key, {})[reply.step] = reply
    return [Sample(prompts[key], tuple(found[step] for step in sorted(found))) for key, found in replies.items()]


def _sample_records(folder: Path, notes: list[str]) -> list[dict[str, object]]:
    """Return the lines of samples.jsonl that are objects with a step and a prompt."""
    found, damaged = [], 0
    for line in filter(str.strip, _content(folder / SAMPLES, notes).split("\n")):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            record = None
        step, prompt = (record.get("step"), record.get("prompt_id")) if isinstance(record, dict) else (None, None)
        if type(step) is int and 0 <= step < 2**53 and isinstance(prompt, str):
            found.append(record)
        else:
            damaged += 1
    if damaged:
        notes.append(f"{SAMPLES} has {damaged:,} lines that are truncated or damaged: left out.")
    return found


def read_suspects(folder: Path, notes: list[str]) -> dict[str, list[Suspect]]:
    """Read suspects.csv, by kind in the file's order; add a note about what cannot be read."""
    found: dict[str, list[Suspect]] = {kind: [] for kind in _KINDS}
    try:
        for cells in csv.DictReader(io.StringIO(_content(folder / SUSPECTS, notes), newline="")):
            suspect = Suspect(
                kind=_cell(cells.get("kind")),
                place=_cell(cells.get("place")),
                label=_cell(cells.get("label")),
                reward=_cell_number(cells.get("reward")),
                change=_cell_number(cells.get("change")),
                prompt=_cell(cells.get("prompt")),
                completion=_cell(cells.get("completion")),
                others=_cell(cells.get("others")),
            )
            if suspect.kind in found:
                found[suspect.kind].append(suspect)
    except (csv.Error, AttributeError) as error:
        notes.append(f"{SUSPECTS} cannot be read to its end ({said_by(error)}).")
    return {kind: suspects for kind, suspects in found.items() if suspects}


def _cell(text: str | None) -> str:
    """Return a cell as it was before it was protected from spreadsheets, readable."""
    text = text or ""
    return readable(text[1:] if _PROTECTED.match(text) else text, _LONGEST_OF_SUSPECT)


def _cell_number(cell: object) -> float | None:
    try:
        return number(float(str(cell)))
    except ValueError:
        return None


def _content(path: Path, notes: list[str]) -> str:
    try:
        return read_foreign(path, most=LARGEST_JSON).decode("utf-8", errors="replace")
    except FileNotFoundError:
        return ""
    except OSError as error:
        notes.append(f"{path.name} cannot be read ({said_by(error)}): its texts are left out.")
        return ""
