"""Hold what was counted in one part of the feedback, as typed values that can become JSON."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from offline_kto.kto_core.errors import (
    CacheError,
    ConfigError,
    FeedbackError,
    KTOError,
    ModelError,
    TokenizationError,
)
from offline_kto.kto_core.feedback.labels import LabelRule, UnknownLabelError
from offline_kto.kto_core.feedback.left_out import OneCountLeftOut
from offline_kto.precompute.feedback.contradictions import Contradictions
from offline_kto.precompute.feedback.found import Found
from offline_kto.precompute.feedback.suspicions import Suspicions
from offline_kto.precompute.feedback.used_columns import UsedInPart

_KINDS = (ConfigError, FeedbackError, TokenizationError, ModelError, CacheError)


@dataclass(frozen=True)
class SaidError:
    """An error that the user can fix: its class, and its message.

    Attributes:
        rule: position of the rule of an unknown label, with the name of its field; None for any other error.
    """

    kind: str
    message: str
    field: str = ""
    rule: int | None = None

    @classmethod
    def of(cls, error: KTOError, rules: Sequence[LabelRule] = ()) -> "SaidError":
        if isinstance(error, UnknownLabelError):
            number = next(number for number, rule in enumerate(rules) if rule is error.rule)
            return cls("UnknownLabelError", str(error), error.field, number)
        kind = next((kind for kind in _KINDS if isinstance(error, kind)), KTOError)
        return cls(kind.__name__, str(error))

    def error(self, rules: Sequence[LabelRule] = ()) -> KTOError:
        """Return the error. Args: rules: those that it was made with, of this process."""
        if self.rule is not None:
            return UnknownLabelError(self.message, self.field, rules[self.rule])
        kinds: dict[str, type[KTOError]] = {kind.__name__: kind for kind in _KINDS}
        return kinds.get(self.kind, KTOError)(self.message)


@dataclass(frozen=True)
class Mistake:
    """A defective record or row, and where it is."""

    where: str
    said: SaidError

    @classmethod
    def of(cls, where: str, error: KTOError, rules: Sequence[LabelRule]) -> "Mistake":
        return cls(where, SaidError.of(error, rules))

    def error(self, rules: Sequence[LabelRule]) -> KTOError:
        return self.said.error(rules)


@dataclass(frozen=True)
class OneCount:
    """A row with one of two numbers of votes; see `OneCountLeftOut`."""

    where: str
    given: str
    missing: str
    message: str

    @classmethod
    def of(cls, where: str, one: OneCountLeftOut) -> "OneCount":
        return cls(where, one.given, one.missing, str(one.error))

    @property
    def left_out(self) -> OneCountLeftOut:
        return OneCountLeftOut(self.given, self.missing, FeedbackError(self.message))


@dataclass(frozen=True)
class FeedbackPart:
    """What `Feedback` has counted in one part of the data.

    Attributes:
        rules: the counts of each rule of labels.
        scores: the scores that each place of labels has counted.
        too_long, objectives_left_out: lines of the file of `--left-out`.
        one_counts, unused_counts: rows with one of two numbers of votes, without and with a label.
        read, compared: columns, as in `FeedbackFields`.
        bad_lines: number of lines that are no records.
        first_bad: what is wrong with the first of them.
    """

    found: Found
    suspicions: Suspicions
    contradictions: Contradictions
    used: UsedInPart
    rules: list[tuple[Counter[tuple[str, str]], dict[str, set[float | None]]]]
    scores: list[dict[str, Counter[str]]]
    mistakes: list[Mistake]
    too_long: list[tuple[str, str, str]]
    one_counts: list[OneCount]
    unused_counts: list[OneCount]
    objectives_left_out: list[dict[str, str]]
    read: set[str]
    compared: set[str]
    bad_lines: int
    first_bad: str
