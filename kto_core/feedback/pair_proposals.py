"""Propose the lines of a mapping for two answers in columns of other names than `chosen` and `rejected`."""

import re
from collections.abc import Iterator, Mapping

from offline_kto.kto_core.feedback.columns import PROMPTS
from offline_kto.kto_core.feedback.pair_verdicts import is_verdict_on_sides
from offline_kto.kto_core.feedback.paths import key_path
from offline_kto.kto_core.feedback.quoting import quoted

# Words in the names of the better and of the worse answer.
_BETTER_AND_WORSE = (
    *(("chosen", "rejected"), ("accepted", "rejected"), ("preferred", "dispreferred"), ("preferred", "rejected")),
    *(("best", "worst"), ("better", "worse"), ("good", "bad"), ("positive", "negative"), ("pos", "neg")),
    *(("winning", "losing"), ("winner", "loser"), ("win", "lose"), ("w", "l")),
)
# Words in the names of two answers of which another column names the better one.
_FIRST_AND_SECOND = (
    *(("a", "b"), ("1", "2"), ("0", "1"), ("first", "second"), ("left", "right"), ("one", "two")),
    *(("A", "B"), ("First", "Second"), ("Left", "Right"), ("One", "Two")),
)


def proposed_pair(record: Mapping[str, object]) -> str:
    """Return the lines of a mapping for the pair in a record, as part of a sentence; empty if there seems to be none."""
    pair = next(_of_named_sides(record), None) or next(_of_verdicts(record), None)
    if pair is None:
        return ""
    prompt = next((name for name in (*PROMPTS, "instruction", "input") if name in record), "PROMPT")
    return f"a line such as `prompt: {prompt}`, and a line `pair: {pair}`"


def _of_named_sides(record: Mapping[str, object]) -> Iterator[str]:
    for chosen, rejected in _two_answers(record, _BETTER_AND_WORSE):
        yield f"{{chosen: {_path(chosen)}, rejected: {_path(rejected)}}}"


def _of_verdicts(record: Mapping[str, object]) -> Iterator[str]:
    verdicts = [(name, value) for name, value in record.items() if is_verdict_on_sides(name)]
    for first, second in _two_answers(record, _FIRST_AND_SECOND):
        for name, value in verdicts:
            named = _names_of_sides(value, first, second)
            if named is not None and name not in (first, second):
                yield (
                    f"{{a: {_path(first)}, b: {_path(second)}, better: {_path(name)}, a_when: [{named[0]}], "
                    f"b_when: [{named[1]}]}}"
                )


def _names_of_sides(value: object, first: str, second: str) -> tuple[str, str] | None:
    """Return the values that name the two answers, of which one is given: 1 and 2, "left" and "right"; None if that is not clear."""
    if isinstance(value, bool) or not isinstance(value, int | str):
        return None
    if value in (first, second):
        return quoted(first), quoted(second)
    found = set()
    for words in _FIRST_AND_SECOND:
        for here, there in (words, words[::-1]):
            if (other := _with_other_word(str(value), here, there)) is not None:
                both = (str(value), other) if here == words[0] else (other, str(value))
                found.add((words, both))
    of_names = [both for words, both in found if _with_other_word(first, *words) == second]
    named = of_names or [both for _, both in found]
    if len(named) != 1:  # 1 is the first of 1 and 2, and the second of 0 and 1
        return None
    one, other = named[0]
    return (one, other) if isinstance(value, int) else (quoted(one), quoted(other))


def _two_answers(record: Mapping[str, object], pairs: tuple[tuple[str, str], ...]) -> Iterator[tuple[str, str]]:
    """Yield two columns with answers whose names differ in one of some pairs of words."""
    answers = {name for name, value in record.items() if isinstance(value, str | list) and value}
    for words in pairs:
        for name in record:
            other = _with_other_word(name, *words)
            if name in answers and other in answers and other is not None:
                yield name, other


def _path(name: str) -> str:
    """Return the path of a column as YAML: one with quotes of its own is quoted again."""
    path = key_path(name)
    escaped = path.replace("'", "''")
    return path if path == name else f"'{escaped}'"


def _with_other_word(name: str, word: str, other: str) -> str | None:
    """Return a name with another word in place of one of its words; None if it does not have it."""
    changed = re.sub(rf"(?<![A-Za-z0-9]){word}(?![A-Za-z0-9])", other, name)
    return None if changed == name else changed
