"""Find the columns that look like feedback, for the message about data without labels."""

import re
import shlex
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

from offline_kto.kto_core.feedback.columns import CONVERSATIONS
from offline_kto.kto_core.feedback.judging import is_count_of_votes
from offline_kto.kto_core.feedback.labels import has_no_value, number_in, usual_label
from offline_kto.kto_core.feedback.paths import key_path
from offline_kto.kto_core.feedback.quoting import quoted
from offline_kto.kto_core.feedback.scales import Scale
from offline_kto.kto_core.feedback.stored_values import opened
from offline_kto.precompute.records.text_files import Located

# Names of columns with feedback in the exports of tools.
_NAMES = re.compile(
    "label|score|rating|rated|feedback|thumb|reward|vote|like|helpful|quality|verdict|accept|approv|correct|good|bad|"
    "pass|fail|reaction|emoji|sentiment|flag|grade|prefer|satisf|useful|safe|stars|eval|judg",
    re.IGNORECASE,
)
# Names of what is undesirable: such a column is no label as it is, because true means desirable.
_UNDESIRABLE = re.compile(
    "toxic|harm(?!less)|unsafe|flag|redact|error|spam|halluc|refus|offens|violat|violen|abus|incorrect|wrong|unhelpful|bad(?!ge)|"
    "fail|reject|dislike|down_?vote|negative|thumbs?_?down|inappropriate|nsfw|(?<!w)hate|insult|profan|inaccura|invalid|"
    "unaccept|useless|irrelevant|mislead|complain|escalat|reported$|needs?_?(?:fix|edit|improve|work|revis|correct|rewrit)|dissatisf|unsatisf|"
    "unresolved|unsolved|untrue|unfaithful|misinform|incomplete|schlecht|falsch|fehler(?!frei)|unbrauchbar|nutzlos|"
    r"(?<![a-z])(?:issue|problem|bug)s?(?![a-z])(?!.*(?:solved|fixed|addressed|closed))|buggy|broken|(?<![a-z])(?:poor|worse|worst|pii|rude|"
    "stale|edited|corrected|reverted|deleted|removed|retracted|withdrawn|cut_?off|abandoned|ignored|skipped|retr(?:y|ied)|leaks?|leaked)|"
    "low[ _-]?quality|(?<!un)bias|fabricat|confus|outdated|obsolete|repetit|off[ _-]?topic|jailb|regenerat|re_?generated|rephrased|churn|"
    "nonsens|gibberish|garbage|truncated|unclear|unsupported|ungrounded|unfounded|unnatural|contradict|inconsisten|evasive|sycophan|"
    "plagiar|malicious|dangerous|illegal|racis|sexis|vulgar|disappoint|frustrat|annoy|schlimm|veraltet",
    re.IGNORECASE,
)
# Names that deny what is desirable: true is undesirable, as in "not_useful".
_NOT_GOOD = re.compile(
    r"(?<![a-z])(?:not?|non|never)[_ -]*(?:useful|helpful|good|ok(?![a-z])|okay|correct|right|valid|accurate|relevant|satisf|solved|"
    "resolved|accept|approv|true|factual|safe|clear|complete|like)",
    re.IGNORECASE,
)
# Names that deny what is undesirable: true is desirable, as in "not_toxic" and "error_free".
_DENIED = re.compile(
    r"(?<![a-z])(?:not?|non|never|without|zero)(?![a-z])|(?<![a-z])non(?=toxic|harm)|[_-]?free(?![a-z])", re.IGNORECASE
)
# Where a word begins in a name such as "hasIssue".
_NEW_WORD = re.compile(r"(?<=[a-z0-9])(?=[A-Z])")
# Paths that only name a value; an expression may turn it round.
_PLAIN_PATH = re.compile(r"[^!=<>|&(){}`?*,]+")
# An expression with a name and a path for each objective.
_OBJECTIVES = re.compile(r"(?:[^{}]*\.)?\{([^{}]*)\}")
# Parts of an expression that find the object of a name: [?name=='toxicity'] | [0].
_BY_NAME = re.compile(r"""\[\?\s*\w+\s*==\s*[`'"]+([^`'"]*)[`'"]+\s*\](?:\s*\|\s*(?=\[))?""")
# Values that mean that something is there or not, whether it is good or bad; other words say that themselves.
_YES_AND_NO = frozenset(("true", "false", "1", "0", "1.0", "0.0", "yes", "no", "y", "n", "positive", "negative"))
# Words of two columns with opposite votes; also capitalised, as in "isLiked" and "UpVotes".
_OPPOSITES = (
    *(("up", "down"), ("like", "dislike"), ("likes", "dislikes"), ("liked", "disliked"), ("upvote", "downvote")),
    *(("upvotes", "downvotes"), ("upvoted", "downvoted"), ("positive", "negative"), ("good", "bad")),
    *(("thumbsup", "thumbsdown"), ("accepted", "rejected"), ("approved", "disapproved"), ("helpful", "unhelpful")),
)
# Keys of a vote that belongs to one message of several.
_OF_A_TURN = re.compile("message|turn|index|step|run", re.IGNORECASE)
_MOST_RECORDS = 10_000
_MOST_COLUMNS = 8
# A text column with more different values is not a scale.
_MOST_WORDS = 12
_DEPTH = 3


def feedback_columns(records: Iterable[Located]) -> list[str]:
    """Return a line for each column that looks like feedback: its path, its values with their counts, what to pass."""
    counts: dict[str, Counter[str]] = {}
    usual: dict[str, bool] = {}
    of_turns: set[str] = set()  # paths in the messages of a conversation
    for number, (_, record) in enumerate(records):
        if number == _MOST_RECORDS:
            break
        for path, value in _values(record):
            counts.setdefault(path, Counter())[quoted(value, 30)] += 1
            usual[path] = usual.get(path, True) and usual_label(value) is not None
        for path, value in _values_of_turns(record):
            if path not in record:
                of_turns.add(path)
                counts.setdefault(path, Counter())[quoted(value, 30)] += 1
                usual[path] = usual.get(path, True) and usual_label(value) is not None
    lines = []
    for path, values in counts.items():
        numbers = sum(number_in(value.strip('"')) is not None for value in values)
        if len(values) > _MOST_WORDS and numbers < len(values):
            continue
        scale = Scale(values)
        if (found := _counterpart(path, counts)) is not None:
            up, down = found
            other = down if path == up else up
            is_count = all(is_count_of_votes(value.strip('"')) for value in values)
            votes = f"--label-field {shlex.quote(f'{{up: {up}, down: {down}}}')}"
            todo = f"pass {votes}" if is_count else "join them in a mapping (--map FILE)"
            lines.append(
                f"{path}: {scale.in_words()}; '{other}' counts the opposite, so neither is the label alone: {todo}"
            )
            continue
        proposal = "" if usual[path] else scale.proposal() or "--up ... --down ..."
        if is_undesirable(path):
            proposal = reversed_options(values) if usual[path] else "--up ... --down ..."
        shown = path if path.isidentifier() else f"'{path}'" if "'" not in path else shlex.quote(path)
        of_messages = " (of messages)" if path in of_turns else ""
        lines.append(
            f"{path}{of_messages}: {scale.in_words()}; pass --label-field {shown}{f' {proposal}' if proposal else ''}"
        )
    return lines[:_MOST_COLUMNS]


def is_undesirable(path: str) -> bool:
    """Return whether a name is that of what is undesirable, so that true, 1 and yes mean a bad answer."""
    words = _NEW_WORD.sub("_", path)
    if _NOT_GOOD.search(words) is not None:
        return True
    return _UNDESIRABLE.search(words) is not None and _DENIED.search(words) is None


def plain_path(path: str) -> str:
    """Return a path that only names a value, or finds it by its name in a list or an object; empty for any other expression."""
    found = _BY_NAME.sub(r".\1", path.rpartition("}.")[2])
    return found if _PLAIN_PATH.fullmatch(found) is not None else ""


def names_in(path: str) -> list[str]:
    """Return the names in an option for labels: one, or those of several objectives, with their paths."""
    members = _OBJECTIVES.fullmatch(path.strip())
    if members is None:
        return [plain_path(one) for one in path.split(",")]
    return [plain_path(name.strip()) for member in members[1].split(",") for name in member.split(":")]


def is_turned_round(path: str, values: Iterable[str]) -> bool:
    """Return whether the usual meaning of a column's values would make what is undesirable desirable.

    Args:
        values: as `Scale` shows them.
    """
    return is_undesirable(plain_path(path)) and any(value.strip('"').strip().lower() in _YES_AND_NO for value in values)


def reversed_options(values: Iterable[str]) -> str:
    """Return options by which the usual words mean their opposite: a true in "toxic" is undesirable."""
    words = [value.strip('"') for value in values]
    up = [word for word in words if usual_label(word) is False]
    down = [word for word in words if usual_label(word) is True]
    return f"--up {shlex.quote(','.join(up) or 'false')} --down {shlex.quote(','.join(down) or 'true')}"


def _values_of_turns(record: Mapping[str, Any]) -> Iterator[tuple[str, object]]:
    """Yield (path in the message, value) of what may be the feedback of single messages."""
    for name in CONVERSATIONS:
        turns = opened(record.get(name))
        for turn in turns if isinstance(turns, list) else ():
            if isinstance(turn, Mapping):
                yield from _values({key: value for key, value in turn.items() if key not in ("role", "content")})


def _counterpart(path: str, columns: Collection[str]) -> tuple[str, str] | None:
    """Return a path and the column with the opposite word, the good one first: thumbs_up and thumbs_down; None without one."""
    for words in _OPPOSITES:
        for here, there in (words, words[::-1]):
            other = re.sub(rf"(?<![A-Za-z]){here}(?![a-z])", there, path)
            other = re.sub(rf"{here.capitalize()}(?![a-z])", there.capitalize(), other)
            if other != path and other in columns:
                return (path, other) if here == words[0] else (other, path)
    return None


def _values(record: Mapping[str, Any], prefix: str = "", depth: int = _DEPTH) -> Iterator[tuple[str, object]]:
    """Yield (path, value) of what may be feedback."""
    for key, value in record.items():
        path = prefix + key_path(key)
        if isinstance(value, Mapping) and depth > 1:
            inside = _values(value, f"{path}.", depth - 1)
            yield from ((name, one) for name, one in inside)
        elif isinstance(value, list) and depth > 1 and _NAMES.search(key):  # of several raters
            for vote in value:
                if isinstance(vote, Mapping) and not any(map(_OF_A_TURN.search, vote)):
                    yield from _values(vote, f"{path}[].", 1)
        elif has_no_value(value) or isinstance(value, list | Mapping):
            continue
        elif isinstance(value, bool) or _NAMES.search(key) or (_NAMES.search(path) and _is_mark(value)):
            yield path, value


def _is_mark(value: object) -> bool:
    return usual_label(value) is not None or number_in(value) is not None
