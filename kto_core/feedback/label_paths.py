"""Find the label of a record: at a path, or among several scores of which one counts."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from offline_kto.kto_core.errors import FeedbackError
from offline_kto.kto_core.feedback.exports import opened
from offline_kto.kto_core.feedback.labels import MOST_VALUES, LabelRule, Scale, UnknownLabelError, has_no_value
from offline_kto.kto_core.feedback.paths import Path
from offline_kto.kto_core.feedback.quoting import quoted


@dataclass(frozen=True)
class LabelPaths:
    """Where the label is, and what its values mean.

    Attributes:
        path: to a value, or to a list with one for each rater. None if `scores` is given.
        scores: to an object from names to values, or to a list of objects with `name` and `value`.
        value: of a score that is an object.
        name: of the score that counts, or a path; needed if there are several.
        seen: how often each score had a value, by name; for errors.
    """

    path: Path | None
    scores: Path | None
    value: Path | None
    name: str | None
    rule: LabelRule
    seen: dict[str, Counter[str]] = field(default_factory=dict, compare=False, repr=False)

    def verdict(self, data: Mapping[str, Any], where: str) -> bool:
        """Return whether the row is desirable. Raises: see `LabelRule.verdict`."""
        if self.scores is None:
            assert self.path is not None
            try:
                return self.rule.verdict(self.path.open(data, where), where, self.path.text)
            except UnknownLabelError as error:
                raise error.about(self.path.read_key(data)) from None
        scores = self.named_scores(data, where)
        for name, value in scores.items():
            counts = self.seen.setdefault(name, Counter())
            shown = (quoted(one, 30) for one in _each(value))
            counts.update(one for one in shown if len(counts) < MOST_VALUES or one in counts)
        if self.name is None and len(scores) > 1:
            raise SeveralScoresError(f"{where}: several scores: {', '.join(scores)}. {_NAME_IT}")
        name = self.name if self.name is not None else next(iter(scores), "score")
        if name not in scores and (name in data or self.path is not None):
            found = data[name] if self.path is None or name in data else self.path.find(data, where)
            return self.rule.verdict(opened(found), where, name)
        return self.rule.verdict(scores.get(name), where, name)

    def has_value(self, data: Mapping[str, Any], where: str) -> bool:
        """Return whether there is a label, whatever it means."""
        if self.scores is not None:
            return bool(self.named_scores(data, where))
        assert self.path is not None
        return not has_no_value(self.path.open(data, where))

    def named_scores(self, data: Mapping[str, Any], where: str) -> dict[str, Any]:
        """Return the values of a record's scores by name, those without a value left out.

        A score that several raters gave has the list of their values.
        """
        assert self.scores is not None
        found = self.scores.open(data, where)
        pairs: list[tuple[object, object]] = []
        if isinstance(found, dict):
            pairs = list(found.items())
        elif isinstance(found, list):
            pairs = [(one.get("name"), one.get("value")) for one in found if isinstance(one, dict)]
        scores: dict[str, Any] = {}
        for name, value in pairs:
            values = [one for item in _each(opened(value)) for one in _each(self._value(item, where))]
            kept = [one for one in values if not has_no_value(one)]
            if kept:
                scores.setdefault(str(name), []).extend(kept)
        return {name: values[0] if len(values) == 1 else values for name, values in scores.items()}

    def _value(self, item: object, where: str) -> object:
        return self.value.find(item, where) if self.value is not None and isinstance(item, dict) else item

    def several(self, where: str) -> "SeveralScoresError | None":
        """Return the error of a file with several scores if none is chosen, or without the chosen one; None if there is none.

        Args:
            where: the file.
        """
        if self.scores is None or not self.seen:
            return None
        shown = "".join(f"\n  {name}: {Scale(values).in_words()}" for name, values in self.seen.items())
        if self.name is None and len(self.seen) > 1:
            return SeveralScoresError(f"{where}: several scores, of which one must be chosen:{shown}\n{_NAME_IT}")
        valued = any(destination != "left out" for _, destination in self.rule.seen)  # a column of that name
        if self.name is not None and self.path is None and self.name not in self.seen and not valued:
            return SeveralScoresError(
                f"{where}: no record has a score {quoted(self.name)}. Scores found:{shown}\n{_NAME_IT}"
            )
        return None


_NAME_IT = "Choose one with --label-field NAME."


def _each(value: object) -> list[object]:
    return list(value) if isinstance(value, list | tuple) else [value]


class SeveralScoresError(FeedbackError):
    """A record has several scores, and none has been chosen."""
