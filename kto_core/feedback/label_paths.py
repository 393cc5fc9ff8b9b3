"""Find the label of a record: at a path, in numbers of votes, among several scores, or one for each objective."""

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from offline_kto.kto_core.errors import FeedbackError
from offline_kto.kto_core.feedback.judging import Reading, judge, of_objectives
from offline_kto.kto_core.feedback.labels import LabelRule, UnknownLabelError, count_first, has_no_value
from offline_kto.kto_core.feedback.left_out import LeftOut
from offline_kto.kto_core.feedback.paths import Path
from offline_kto.kto_core.feedback.quoting import quoted
from offline_kto.kto_core.feedback.scales import Scale
from offline_kto.kto_core.feedback.stored_values import opened


@dataclass(frozen=True)
class LabelPaths:
    """Where the label is, and what its values mean.

    Attributes:
        path: to a value, to a list with one for each rater, or to an object with one for each objective. None if `scores`,
            `votes` or `objectives` is given.
        scores: to an object from names to values, or to a list of objects with `name` and `value`.
        value: of a score that is an object.
        name: of the score that counts, or a path; needed if there are several. Names with commas between them are objectives.
        votes: to the numbers of votes, `up` and `down`.
        objectives: where the label of each objective is; they have the same rule, or rules of their own.
        seen: how often each score had a value, by name; for errors.
    """

    path: Path | None
    scores: Path | None
    value: Path | None
    name: str | None
    rule: LabelRule
    votes: Mapping[str, Path] = field(default_factory=dict)
    objectives: "Mapping[str, LabelPaths]" = field(default_factory=dict)
    seen: dict[str, Counter[str]] = field(default_factory=dict, compare=False, repr=False)

    @property
    def paths(self) -> list[Path]:
        """All paths, those of objectives included."""
        own = [path for path in (self.path, self.scores, *self.votes.values()) if path is not None]
        return [*own, *(path for one in self.objectives.values() for path in one.paths)]

    @property
    def rules(self) -> list[LabelRule]:
        """The rules by which values are judged: those of the objectives, or one."""
        return [rule for one in self.objectives.values() for rule in one.rules] or [self.rule]

    @property
    def whole_rule(self) -> LabelRule:
        """The rule, with the counts of the objectives' own rules."""
        if not self.objectives:
            return self.rule
        rules = self.rules
        seen = sum((rule.seen for rule in rules), Counter[tuple[str, str]]())
        return replace(
            self.rule, seen=seen, numbers={name: one for rule in rules for name, one in rule.numbers.items()}
        )

    def ruled(self, rule: Callable[[LabelRule], LabelRule]) -> "LabelPaths":
        """Return the same paths with other rules, and without counts."""
        objectives = {name: one.ruled(rule) for name, one in self.objectives.items()}
        return replace(self, rule=rule(self.rule), objectives=objectives, seen={})

    @property
    def each(self) -> "list[LabelPaths]":
        """These paths, and those of all objectives."""
        return [self, *(label for one in self.objectives.values() for label in one.each)]

    def merge(self, seen: Mapping[str, Counter[str]]) -> None:
        """Add the scores that the same paths have counted, without a limit, in records that come after all others."""
        for name, counts in seen.items():
            own = self.seen.setdefault(name, Counter())
            for value, count in counts.items():
                count_first(own, value, self.rule.most, count)

    def read(self, data: Mapping[str, Any], where: str) -> Reading:
        """Return what is read of a row. Raises: see `judging.judge`."""
        if self.objectives:
            return self._of_objectives(data, where)
        if self.votes:
            counts = {name: path.find(data, where) for name, path in self.votes.items()}
            given = any(not has_no_value(count) for count in counts.values())
            return judge(self.rule, counts if given else None, where, "votes")
        if self.scores is None:
            assert self.path is not None
            try:
                return judge(self.rule, self.path.open(data, where), where, self.path.text)
            except FeedbackError as error:
                raise _about(error, self.path, data) from None
        scores = self.named_scores(data, where)
        for name, value in scores.items():
            counts = self.seen.setdefault(name, Counter())
            for one in _each(value):
                count_first(counts, quoted(one, 30), self.rule.most)
        if self.name is None and len(scores) > 1:
            raise SeveralScoresError(f"{where}: several scores: {', '.join(scores)}. {_NAME_IT}")
        if len(names := self.names(scores)) > 1:
            return judge(self.rule, {one: scores.get(one) for one in names}, where, "scores")
        name = self.name if self.name is not None else next(iter(scores), "score")
        if name not in scores and (name in data or self.path is not None):
            found = data[name] if self.path is None or name in data else self.path.find(data, where)
            return judge(self.rule, opened(found), where, name)
        return judge(self.rule, scores.get(name), where, name)

    def read_copies(self, copies: Sequence[Mapping[str, Any]], where: str) -> Reading:
        """Return what is read of a row that is there several times, once for each of its votes. Equal copies are one vote."""
        if self.path is None or self.scores is not None:
            return self.read(next((one for one in copies if self.has_value(one, where)), copies[0]), where)
        voted = [one for number, one in enumerate(copies) if one not in copies[:number] and self.has_value(one, where)]
        if len(voted) < 2:
            return self.read([*voted, *copies][0], where)
        values = [one for copy in voted for one in _each(self.path.open(copy, where))]
        try:
            return judge(self.rule, values, where, self.path.text)
        except FeedbackError as error:
            raise _about(error, self.path, voted[0]) from None

    def names(self, scores: Collection[str]) -> list[str]:
        """Return the names of the scores that are read; several are objectives.

        Args:
            scores: all names; one of them may contain a comma.
        """
        if self.name is None:
            return list(scores)
        if self.name in scores or self.path is not None:
            return [self.name]
        parts = [part.strip() for part in self.name.split(",")]
        return parts if all(parts) else [self.name]

    def _of_objectives(self, data: Mapping[str, Any], where: str) -> Reading:
        """Return what is read of the objectives; one without a value is not judged."""
        readings: dict[str, Reading | LeftOut] = {}
        unknown: list[UnknownLabelError] = []
        for name, label in self.objectives.items():
            try:
                readings[name] = label.read(data, where)
            except LeftOut as left:
                readings[name] = left.with_traceback(None)  # whose frames would keep the record
            except UnknownLabelError as error:  # raised once the values of all objectives are counted
                unknown.append(error)
        if unknown:
            raise unknown[0]
        return of_objectives(readings)

    def has_value(self, data: Mapping[str, Any], where: str) -> bool:
        """Return whether there is a label, whatever it means."""
        if self.scores is not None:
            return bool(self.named_scores(data, where))
        return any(not has_no_value(path.open(data, where)) for path in self.paths)

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
        names = self.names(self.seen)
        missing = [name for name in names if name not in self.seen]
        if missing and self.path is None and (len(names) > 1 or not valued):
            return SeveralScoresError(
                f"{where}: no record has a score {quoted(missing[0])}. Scores found:{shown}\n{_NAME_IT}"
            )
        return None


_NAME_IT = "Choose one with --label-field NAME, or several objectives with --label-field NAME,NAME."


def _about(error: FeedbackError, path: Path, data: Mapping[str, Any]) -> FeedbackError:
    """Return an error about a label that names the keys which the path reads, not an expression that the reader has not written."""
    key = path.read_key(data)
    if isinstance(error, UnknownLabelError):
        error = error.about(key)
    said = str(error).replace(f"'{path.text}", f"'{key or path.name_in(data)}")
    return (
        UnknownLabelError(said, error.field, error.rule)
        if isinstance(error, UnknownLabelError)
        else FeedbackError(said)
    )


def _each(value: object) -> list[object]:
    return list(value) if isinstance(value, list | tuple) else [value]


class SeveralScoresError(FeedbackError):
    """A record has several scores, and none has been chosen."""
