"""Read the texts of a run for its report page: sampled completions, suspect rows."""

import unicodedata
from dataclasses import dataclass
from pathlib import Path

from offline_kto.kto_core.errors import said_by
from offline_kto.kto_core.feedback.quoting import counted
from offline_kto.kto_core.foreign_files import read_foreign
from offline_kto.kto_core.redaction import hidden
from offline_kto.train.run_files import SUSPECTS
from offline_kto.train.samples_file import LARGEST_SAMPLES, SAMPLES, parse_samples
from offline_kto.train.suspects_file import KINDS
from offline_kto.train.suspects_file import read_suspects as suspects_in

MOST_SAMPLES, MOST_SUSPECTS = 100, 25  # prompts; rows of each kind
_LONGEST, _LONGEST_OF_SUSPECT = 20_000, 2_000  # characters of one text
_SNIPPET = 110
_KEPT = "\n\t\u200c\u200d"  # line breaks, and the joiners that scripts and emoji need


@dataclass(frozen=True)
class Reply:
    """A completion at one step; `ended` is false if it was cut at its budget of tokens."""

    step: int
    text: str
    ended: bool
    tokens: int


@dataclass(frozen=True)
class Sample:
    """A held-out prompt and its completions, the first before training and the last of the saved model."""

    prompt: str
    replies: tuple[Reply, ...]


@dataclass(frozen=True)
class Suspect:
    """A row of the feedback that should be looked at."""

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
    try:
        records, damaged = parse_samples(read_foreign(folder / SAMPLES, most=LARGEST_SAMPLES))
    except FileNotFoundError:
        return []
    except OSError as error:
        notes.append(f"{SAMPLES} cannot be read ({said_by(error)}): its texts are left out.")
        return []
    if damaged:
        notes.append(f"{SAMPLES} has {counted(damaged, 'line')} truncated or damaged: left out.")
    prompts: dict[str, str] = {}
    replies: dict[str, dict[int, Reply]] = {}
    for record in records:
        reply = Reply(record["step"], readable(record["completion"]), record["ended"], record["tokens"])
        prompts.setdefault(record["prompt_id"], readable(record["prompt"]))
        replies.setdefault(record["prompt_id"], {})[reply.step] = reply
    return [Sample(prompts[key], tuple(found[step] for step in sorted(found))) for key, found in replies.items()]


def read_suspects(folder: Path, notes: list[str]) -> dict[str, list[Suspect]]:
    """Read suspects.csv, by kind in the file's order; add a note if it cannot be read."""
    try:
        rows = suspects_in(folder / SUSPECTS)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        notes.append(f"{SUSPECTS} cannot be read ({said_by(error)}): its rows are left out.")
        return {}
    found: dict[str, list[Suspect]] = {kind: [] for kind in KINDS}
    for row in rows:
        place, prompt, completion, others = (
            readable(text, _LONGEST_OF_SUSPECT) for text in (row.place, row.prompt, row.completion, row.others)
        )
        label = "desirable" if row.label else "undesirable"
        found[row.kind].append(Suspect(place, label, row.reward, row.change, prompt, completion, others))
    return {kind: suspects for kind, suspects in found.items() if suspects}
