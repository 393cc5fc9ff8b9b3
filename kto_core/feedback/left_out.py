"""Leave out rows that are valid but contain nothing to train on, and count them by reason."""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from offline_kto.kto_core.errors import FeedbackError

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
OTHER_FORMAT = "another format"
OTHER_SCORES = "scores of an observation or a session"
CORRECTED = "corrected, but not rated"
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


class OneCountLeftOut(LeftOut):
    """A row has a number of votes for or against, but not both, and no label: unrated, or defective if other rows have both.

    Attributes:
        given, missing: names of the two columns.
        error: of the defective row.
    """

    def __init__(self, given: str, missing: str, error: FeedbackError) -> None:
        super().__init__(UNRATED, f"there is a '{given}', but no '{missing}'")
        self.given, self.missing, self.error = given, missing, error


class ObjectivesLeftOut(LeftOut):
    """None of a row's objectives is judged.

    Attributes:
        objectives: why, by name.
    """

    def __init__(self, objectives: Mapping[str, LeftOut]) -> None:
        reasons = [one.reason for one in objectives.values() if one.reason != UNRATED]
        why = "; ".join(f"{name}: {one}" for name, one in objectives.items() if one.reason != UNRATED)
        names = f"no objective is judged: {', '.join(objectives)}"
        super().__init__(reasons[0] if reasons else UNRATED, f"{names} ({why})" if why else names)
        self.objectives = objectives


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

    def merge(self, later: "LeftOutRows") -> None:
        """Add rows that were found after all others."""
        self.rows += later.rows
        self.counts.update(later.counts)

    def in_words(self) -> Iterator[str]:
        """Yield "unrated: 12" for each reason, the most frequent first."""
        for reason, count in self.counts.most_common():
            yield f"{reason}: {count:,}"
