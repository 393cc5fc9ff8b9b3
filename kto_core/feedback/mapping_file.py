"""Check a mapping in YAML: where a file has its prompts, completions and labels.

    records: feedback_data          the list of records, in a document that is one object
    where: "type == 'rating'"       a condition; other records are left out
    system: params.system           text put before the prompt
    prompt: input.messages          text or messages
    completion: output              text or messages; or
    conversation: messages          all messages, of which the last is judged; or
    pair:                           two completions
      chosen: preferred             and rejected; or
      a: response_a                 and b, and the better one of them:
      better: winner
      a_when: [model_a]
      b_when: [model_b]
      scores: [score_a, score_b]    of the two; a row in which they contradict `better` is refused
    turns: ...                      a conversation with judged turns; see `JudgedTurns`
    label:                          a path, or
      path: rating
      up: [">=4"]
      down: ["<=2"]
      else: refuse                  leave-out, up or down
      scale: [1, 5]                 other numbers are refused
      rating-scale: [1, 5]          in place of up and down: 2 is a desirable mass of 0.25 and an undesirable one of 0.75
    label:                          several scores, of which --label-field chooses one:
      scores: feedback_stats        an object from names to values, or a list of objects with `name` and `value`
      value: avg                    where a score that is an object has its value
    votes:                          in place of label: the paths to two numbers of votes, or one to the labels of several raters
      up: upvotes
      down: downvotes
    labels:                         in place of label: a label for each objective, each as under `label` or `votes`; or the path to an
      helpful: ratings.helpful      object of them
      safe: {path: toxic, up: [false], down: [true]}
    weight: confidence              a path; 0 leaves the row out
    each: completions               a list; `item` is then one of its items, and `index` its number from 0
    zip: {text: texts, score: scores}   parallel lists; `item` has one value of each
    strip: ['<details.*?</details>']    patterns removed from the assistant's text
    join: conversationId            records with the same value become one, in which `rows` lists them
    chat: never                     auto, always: text becomes a user's message and an assistant's
    warn:                           a warning with the number of records for which `when` is true
      when: "length(output) == `500`"
      say: answers are cut
    aside: [score_A]                columns of the format that are not needed: no warning that they are not read
    refuse: it has no labels        why a recognised format cannot be used

Every path is JMESPath (see `paths`). Leave out keys that are not needed.
"""

import dataclasses
import re

from offline_kto.kto_core.errors import ConfigError, FeedbackError, nearest
from offline_kto.kto_core.feedback.judging import check_objective
from offline_kto.kto_core.feedback.label_paths import LabelPaths
from offline_kto.kto_core.feedback.labels import ELSE, REFUSE, LabelRule, number_in
from offline_kto.kto_core.feedback.left_out import MEDIA
from offline_kto.kto_core.feedback.mapping import JudgedTurns, Mapping, PairPaths
from offline_kto.kto_core.feedback.paths import Path, compiled
from offline_kto.kto_core.feedback.quoting import quoted

CHAT = ("auto", "always", "never")


def mapping_from(table: object, source: str) -> Mapping:
    """Check a mapping as read from YAML.

    Args:
        source: its file, for errors.

    Raises:
        ConfigError: an unknown key, an invalid path, or keys that exclude each other.
    """
    keys = _Keys(table, source)
    mapping = Mapping(
        name=keys.text("name") or source,
        warn=_warn(keys.take("warn"), f"{source}: warn"),
        refuse=keys.text("refuse"),
        aside=tuple(map(str, keys.values("aside"))),
        **{name: keys.path(name) for name in _PATHS},
        zip={name: compiled(text, f"{source}: zip: {name}") for name, text in keys.texts("zip").items()},
        label=_judged(keys, source),
        pair=_pair(keys.take("pair"), f"{source}: pair"),
        turns=_turns(keys.take("turns"), f"{source}: turns"),
        strip=_patterns(keys.take("strip"), f"{source}: strip"),
        chat=keys.choice("chat", CHAT),
    )
    keys.finish()
    if mapping.refuse is None:
        _check_whole(mapping, source)
    return mapping


_PATHS = (
    *(
        "recognise",
        "records",
        "where",
        "system",
        "tools",
        "prompt",
        "completion",
        "conversation",
        "each",
        "join",
        "weight",
    ),
)


def _check_whole(mapping: Mapping, source: str) -> None:
    answers = {name: getattr(mapping, name) is not None for name in ("completion", "conversation", "pair", "turns")}
    given = [name for name, there in answers.items() if there]
    if len(given) != 1:
        found = f"got {' and '.join(given)}" if given else "got none of them"
        raise ConfigError(f"{source}: give one of completion, conversation, pair and turns; {found}.")
    if mapping.completion is not None and mapping.prompt is None:
        raise ConfigError(f"{source}: completion needs prompt.")
    if mapping.label is None and mapping.pair is None and mapping.turns is None:
        raise ConfigError(f"{source}: label is missing: the path of the rating or the thumb (or votes, or labels).")
    if mapping.label is not None and (mapping.pair is not None or mapping.turns is not None):
        raise ConfigError(f"{source}: label and {given[0]} exclude each other. Remove one of them.")
    if mapping.each is not None and mapping.zip:
        raise ConfigError(f"{source}: each and zip exclude each other.")


def _judged(keys: "_Keys", source: str) -> LabelPaths | None:
    """Return the label of a row, which may be one label, votes, or one for each objective."""
    found = {
        "label": _label(keys.take("label"), f"{source}: label"),
        "votes": _votes(keys.take("votes"), f"{source}: votes"),
        "labels": _objectives(keys.take("labels"), f"{source}: labels"),
    }
    given = [name for name, label in found.items() if label is not None]
    if len(given) > 1:
        raise ConfigError(f"{source}: {' and '.join(given)} exclude each other. Remove one of them.")
    return found[given[0]] if given else None


def _votes(value: object, source: str) -> LabelPaths | None:
    if value is None or isinstance(
        value, str
    ):  # a path to the labels of several raters, or to an object with both numbers
        return _label(value, source)
    keys = _Keys(value, source)
    up, down = keys.path("up"), keys.path("down")
    keys.finish()
    if up is None or down is None:
        raise ConfigError(f"{source}: give up and down, the paths of the numbers of votes.")
    return LabelPaths(None, None, None, None, LabelRule(), {"up": up, "down": down})


def _objectives(value: object, source: str) -> LabelPaths | None:
    if value is None or isinstance(value, str):  # a path to an object with a label for each objective
        return _label(value, source)
    if not isinstance(value, dict) or not value:
        raise ConfigError(f"{source}: must have the name and the label of each objective, got {quoted(value)}.")
    objectives: dict[str, LabelPaths] = {}
    for name, table in value.items():
        try:
            check_objective(name, source)
        except FeedbackError as error:
            raise ConfigError(str(error)) from None
        read = _votes if isinstance(table, dict) and table.keys() == {"up", "down"} else _label
        label = read(table, f"{source}: {name}")
        if label is None:
            raise ConfigError(f"{source}: {name}: the path of its label is missing.")
        objectives[name] = label
    return LabelPaths(None, None, None, None, LabelRule(), objectives=objectives)


def _label(value: object, source: str) -> LabelPaths | None:
    if value is None:
        return None
    if isinstance(value, str):
        return LabelPaths(compiled(value, source), None, None, None, LabelRule())
    keys = _Keys(value, source)
    path, scores, inner, name = keys.path("path"), keys.path("scores"), keys.path("value"), keys.text("name")
    rule = _rule(keys.values("up"), keys.values("down"), keys.choice("else", ELSE) or REFUSE, source)
    graded = _scale(keys.values("rating-scale"), f"{source}: rating-scale")
    rule = dataclasses.replace(rule, scale=_scale(keys.values("scale"), f"{source}: scale"), graded=graded)
    keys.finish()
    if graded and (rule.up or rule.down or rule.scale or graded[0] == graded[1]):
        raise ConfigError(f"{source}: rating-scale: two different ratings, without up, down and scale.")
    if (path is None) == (scores is None):
        raise ConfigError(f"{source}: give either path or scores.")
    return LabelPaths(path, scores, inner, name, rule)


def _scale(values: tuple[object, ...], source: str) -> tuple[float, ...]:
    numbers = [number for value in values if (number := number_in(value)) is not None]
    if len(numbers) != len(values) or len(numbers) not in (0, 2) or sorted(numbers) != numbers:
        raise ConfigError(f"{source}: the lowest and the highest rating, as in [1, 5], got {quoted(list(values))}.")
    return tuple(numbers)


def _rule(up: tuple[object, ...], down: tuple[object, ...], otherwise: str, source: str) -> LabelRule:
    try:
        return LabelRule(up, down, otherwise)
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from None


def _pair(value: object, source: str) -> PairPaths | None:
    if value is None:
        return None
    keys = _Keys(value, source)
    paths = {name: keys.path(name) for name in ("chosen", "rejected", "a", "b", "better")}
    rule = _rule(keys.values("a_when"), keys.values("b_when"), REFUSE, source)
    scores = tuple(compiled(str(one), f"{source}: scores") for one in keys.values("scores"))
    keys.finish()
    if len(scores) not in (0, 2):
        raise ConfigError(
            f"{source}: scores: the paths of two scores, of a and of b, got {quoted([one.text for one in scores])}."
        )
    chosen, rejected, a, b, better = paths.values()
    if chosen is not None and rejected is not None and (a, b, better) == (None, None, None):
        return PairPaths(chosen, rejected, None, rule, scores)
    if a is not None and b is not None and better is not None and (chosen, rejected) == (None, None) and rule.up:
        return PairPaths(a, b, better, rule, scores)
    raise ConfigError(f"{source}: give chosen and rejected, or a, b, better, a_when and b_when.")


def _turns(value: object, source: str) -> JudgedTurns | None:
    if value is None:
        return None
    keys = _Keys(value, source)
    messages, label = keys.path("messages"), _label(keys.take("label"), f"{source}: label")
    rank = keys.path("rank")
    if messages is None or (label is None) == (rank is None):
        raise ConfigError(f"{source}: give at least messages, and either label or rank.")
    turns = JudgedTurns(
        messages=messages,
        id=keys.path("id"),
        parent=keys.path("parent"),
        rated=keys.path("rated"),
        role=keys.path("role") or compiled("role", source),
        roles={name.lower(): role for name, role in keys.texts("roles").items()},
        text=keys.path("text"),
        label=label,
        children=keys.path("children"),
        leave_out=_reasons(keys.take("leave-out"), f"{source}: leave-out"),
        rank=rank,
    )
    keys.finish()
    if turns.parent is not None and turns.children is not None:
        raise ConfigError(f"{source}: give parent or children, not both.")
    if turns.parent is not None and turns.id is None:
        raise ConfigError(f"{source}: parent needs id.")
    if rank is not None and turns.parent is None and turns.children is None:
        raise ConfigError(f"{source}: rank needs parent or children.")
    return turns


def _warn(value: object, source: str) -> tuple[Path, str] | None:
    if value is None:
        return None
    keys = _Keys(value, source)
    when, say = keys.path("when"), keys.text("say")
    keys.finish()
    if when is None or say is None:
        raise ConfigError(f"{source}: give when and say.")
    return when, say


def _reasons(value: object, source: str) -> tuple[tuple[str, Path], ...]:
    """Return (reason, path) of turns that are left out; a path without a reason is that of images and other media."""
    if value is None:
        return ()
    if isinstance(value, str):
        return ((MEDIA, compiled(value, source)),)
    if not isinstance(value, dict) or not all(isinstance(one, str) for one in value.values()):
        raise ConfigError(f"{source}: a path, or reasons and paths, got {quoted(value)}.")
    return tuple((str(reason), compiled(text, f"{source}: {reason}")) for reason, text in value.items())


def _patterns(value: object, source: str) -> tuple[re.Pattern[str], ...]:
    found: list[re.Pattern[str]] = []
    for text in value if isinstance(value, list) else [] if value is None else [value]:
        if not isinstance(text, str):
            raise ConfigError(f"{source}: must be a regular expression, got {quoted(text)}.")
        try:
            found.append(re.compile(text, re.DOTALL))
        except re.error as error:
            raise ConfigError(f"{source}: {quoted(text)} is not a regular expression: {error}") from None
    return tuple(found)


class _Keys:
    """The keys of one table of a mapping. Keys are removed when they are read; the rest is unknown."""

    def __init__(self, table: object, source: str) -> None:
        if not isinstance(table, dict):
            raise ConfigError(f"{source}: must have keys such as `prompt: input.messages`, got {quoted(table)}.")
        self._left, self._source = dict(table), source
        self._known: list[str] = []

    def take(self, name: str) -> object:
        self._known.append(name)
        return self._left.pop(name, None)

    def text(self, name: str) -> str | None:
        value = self.take(name)
        if value is not None and not isinstance(value, str):
            raise ConfigError(f"{self._source}: {name}: must be text, got {quoted(value)}.")
        return value

    def path(self, name: str) -> Path | None:
        text = self.text(name)
        return None if text is None else compiled(text, f"{self._source}: {name}")

    def choice(self, name: str, choices: tuple[str, ...]) -> str | None:
        text = self.text(name)
        if text is not None and text not in choices:
            raise ConfigError(f"{self._source}: {name}: one of {', '.join(choices)}, got {quoted(text)}.")
        return text

    def values(self, name: str) -> tuple[object, ...]:
        value = self.take(name)
        return tuple(value) if isinstance(value, list) else () if value is None else (value,)

    def texts(self, name: str) -> dict[str, str]:
        value = self.take(name)
        if value is None:
            return {}
        if not isinstance(value, dict) or not all(isinstance(one, str) for one in value.values()):
            raise ConfigError(f"{self._source}: {name}: must map names to texts, got {quoted(value)}.")
        return {str(key).lower() if isinstance(key, bool) else str(key): one for key, one in value.items()}

    def finish(self) -> None:
        """Refuse the keys that were not read."""
        for name in self._left:
            raise ConfigError(f"{self._source}: unknown key {quoted(name)}.{nearest(str(name), self._known)}")
