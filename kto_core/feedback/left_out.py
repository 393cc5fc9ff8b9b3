"""Leave out rows that are valid but contain nothing to train on, and count them by reason."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

# Why a row is left out. The plan and the file of `--left-out` use these words.
UNRATED = "unrated"
TIE = "tie"
EMPTY = "empty answer"
MEDIA = "images, audio or other media"
SAME_ANSWERS = "identical answers"
RATERS_DISAGREE = "raters disagree"
DEAD_ZONE = "between up and down"
NO_WEIGHT = "weight 0"
NOT_CHOSEN = "excluded by `where`"
NO_PROMPT = "no prompt"
EMPTY_RECORD = "empty record"
MISSING_TURNS = "missing messages"
NOT_ASSISTANT = "judged turn of another role"
OTHER_SPLIT = "another split"
DEFECTIVE = "defective"


class LeftOut(Exception):  # noqa: N818 - not an error: the file is valid
    """A row is valid but contains nothing to train on.

    Attributes:
        reason: one of the constants above; rows are counted by it.
        detail: what was found, for the file of `--left-out`.
    """

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason, self.detail = reason, detail


@dataclass
class LeftOutRows:
    """The rows that were left out, counted by reason.

    Attributes:
        rows: (where, reason, detail) of each, in the order in which they were found.
    """

    rows: list[tuple[str, str, str]] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)

    def add(self, where: str, reason: str, detail: str = "") -> None:
        """Add a row."""
        self.rows.append((where, reason, detail))
        self.counts[reason] += 1

    def in_words(self) -> Iterator[str]:
        """Yield "unrated: 12" for each reason, the most frequent first."""
        for reason, count in self.counts.most_common():
            yield f"{reason}: {count:,}"
