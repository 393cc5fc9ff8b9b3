"""Count what was found in the feedback, for the plan."""

import sys
from collections import Counter
from dataclasses import dataclass, field

from offline_kto.kto_core.feedback.left_out import LeftOutRows, OneCountLeftOut
from offline_kto.kto_core.feedback.messages import Turns
from offline_kto.kto_core.feedback.records import FeedbackRow
from offline_kto.precompute.feedback.agreement import MOST_VOTES, Agreement, add_votes
from offline_kto.precompute.feedback.places_found import Places

# How programs write a missing value into a table; as a text it would be trained on.
_MISSING = {
    "NaN",
    "nan",
    "None",
    "null",
    "NULL",
    "<NA>",
    "NaT",
    r"\N",  # MySQL, and COPY of PostgreSQL
    "(null)",
    "<null>",
    "undefined",
    "N/A",
    "n/a",
    "#N/A",
    "#NAME?",
    "#VALUE!",
    "#REF!",
    "#DIV/0!",
    "#NULL!",
    "#NUM!",
}


@dataclass
class Found:
    """What was found in the feedback, for the plan.

    The rows are those that could be rendered, also if their prompts are too long.

    Attributes:
        records: records read.
        forms: rows by the format that they were read in.
        left_out: rows that cannot be used.
        columns: columns with a value, by the number of records that have one.
        chat, plain: rows of messages, and of text.
        system: rows with a system message.
        from_text: rows whose text became messages.
        rendered: rows of text that a chat template has rendered already; they remain text.
        moved_results: rows in which results of tools were moved to the prompt.
        labels: rows by label.
        splits: records by the value of their column `split`.
        missing: rows whose text is the name of a missing value.
        notes: sentences on how the records were found.
        warned: records to which the mapping's warning applies.
        agreement: the votes of several raters, by the name of their objective; "" for those on the row itself.
        not_judged: rows in which an objective has a value, but counts as not judged, by its name and the reason.
        one_count: why a row is unrated that has one of two numbers of votes; None without such rows.
        is_mixed: whether any row has a mass of both classes.
        is_part: whether this is one part of the data, to be merged. Limits apply to all parts together.
    """

    records: int = 0
    forms: Counter[str] = field(default_factory=Counter)
    left_out: LeftOutRows = field(default_factory=LeftOutRows)
    columns: Counter[str] = field(default_factory=Counter)
    chat: int = 0
    plain: int = 0
    system: int = 0
    from_text: int = 0
    rendered: int = 0
    moved_results: int = 0
    labels: Counter[bool] = field(default_factory=Counter)
    splits: Counter[str] = field(default_factory=Counter)
    missing: Places = field(default_factory=Places)
    notes: list[str] = field(default_factory=list)
    warned: int = 0
    agreement: dict[str, Agreement] = field(default_factory=dict)
    not_judged: Counter[tuple[str, str]] = field(default_factory=Counter)
    one_count: OneCountLeftOut | None = None
    is_mixed: bool = False
    is_part: bool = False

    def add(self, row: FeedbackRow) -> None:
        """Count a row."""
        self.forms[row.form] += 1
        if isinstance(row.prompt, str):
            self.plain += 1
        else:
            self.chat += 1
            self.system += any(message["role"] in ("system", "developer") for message in row.prompt)
        self.from_text += row.from_text
        self.rendered += row.rendered
        self.moved_results += row.moved_results
        self.labels[row.label] += 1
        if row.reading is not None:
            self.is_mixed = self.is_mixed or min(row.judgement.masses) > 0
            add_votes(self.agreement, row.reading.ballots, most_votes=sys.maxsize if self.is_part else MOST_VOTES)
            for name, left in row.reading.left_out.items():
                self.not_judged[name, left.reason] += 1
        if _has_missing(row.completion) or _has_missing(row.prompt):
            self.missing.add(row.where)

    def merge(self, later: "Found") -> None:
        """Add what was found in the next part of the data."""
        self.records += later.records
        for counts, more in (
            (self.forms, later.forms),
            (self.columns, later.columns),
            (self.splits, later.splits),
        ):
            counts.update(more)
        self.labels.update(later.labels)
        self.not_judged.update(later.not_judged)
        self.left_out.merge(later.left_out)
        self.chat += later.chat
        self.plain += later.plain
        self.system += later.system
        self.from_text += later.from_text
        self.rendered += later.rendered
        self.moved_results += later.moved_results
        self.missing.merge(later.missing)
        self.warned += later.warned
        for name, votes in later.agreement.items():
            self.agreement.setdefault(name, Agreement()).merge(votes)
        self.is_mixed = self.is_mixed or later.is_mixed


def _has_missing(side: Turns) -> bool:
    """Return whether a text, or one of the messages, is the name of a missing value."""
    texts = [side] if isinstance(side, str) else [message["content"] for message in side if message["role"] != "tool"]
    return any(map(names_no_value, texts))


def names_no_value(text: object) -> bool:
    """Return whether a text is the name of a missing value."""
    return isinstance(text, str) and text.strip() in _MISSING
