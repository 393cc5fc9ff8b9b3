"""Find which columns of the data were read, and which keys beside them were not."""

import contextlib
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from collections.abc import Mapping as AnyMapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from offline_kto.kto_core.errors import FeedbackError
from offline_kto.kto_core.feedback.columns import (
    COMPLETIONS,
    CONVERSATIONS,
    PROMPTS,
    FeedbackFields,
    read_in_form,
)
from offline_kto.kto_core.feedback.judging import COUNTS
from offline_kto.kto_core.feedback.label_paths import LabelPaths
from offline_kto.kto_core.feedback.left_out import LeftOut
from offline_kto.kto_core.feedback.mapping import Mapping
from offline_kto.kto_core.feedback.message_keys import MESSAGE_KEYS, TEXT_KEYS
from offline_kto.kto_core.feedback.message_text import begins_with_roles
from offline_kto.kto_core.feedback.paths import Path, opened_at, option_path
from offline_kto.kto_core.feedback.reads import Route
from offline_kto.kto_core.feedback.turns import KEYS_OF_TURNS
from offline_kto.precompute.feedback.context_keys import (
    changes_a_message,
    context_names,
    is_context,
    unread_context,
    unusual,
)
from offline_kto.precompute.feedback.contradictions import VERDICTS

# Columns with lists of messages that the native formats read.
_MESSAGES = (*CONVERSATIONS, *PROMPTS, *COMPLETIONS, "chosen", "rejected", "history")
# Messages of the native formats, as `UsedColumns.beside` names their keys.
_OF_MESSAGES = tuple(f"{name}[]" for name in _MESSAGES)

# A path that makes an object of two plain paths.
_OBJECT = re.compile(r"\{[^{}\[\]()]*\}")
_MEMBER = re.compile(r"""(\w+|"[^"]*")\s*:\s*([^,{}]+?)\s*(?=[,}])""")

# Records that are looked at even if their keys are those of an earlier one: later ones only if a name in them is new.
_LOOKED_AT = 1000


# The columns of a record with a value, and names in them.
Shape: TypeAlias = tuple[frozenset[str], frozenset[str], frozenset[str]]


def matters_beside(name: str) -> bool:
    """Return whether a key beside those that are read, as `UsedColumns.beside` names it, changes the meaning of a row."""
    parent, _, key = name.rpartition(".")
    return is_context(key) or (parent in _OF_MESSAGES and changes_a_message(key))


@dataclass
class Look:
    """What was seen in records that look alike.

    Attributes:
        numbers: of the records in their part of the data, from 1.
        shape: its columns with a value, the names of context in them, and the keys of messages.
        read, beside, with_messages: as in `UsedColumns`.
    """

    numbers: list[int]
    shape: Shape
    read: set[str]
    beside: set[str]
    with_messages: set[str]

    @property
    def content(self) -> tuple[Shape, frozenset[str], frozenset[str], frozenset[str]]:
        """All but the numbers."""
        return self.shape, frozenset(self.read), frozenset(self.beside), frozenset(self.with_messages)


@dataclass
class UsedInPart:
    """What one part of the data says about the columns.

    Attributes:
        records: number of records.
        looks: the records that were looked at: every one that would be, whatever comes before this part.
        named: columns that are read whatever the paths say.
        unmatched: positions of the paths that have no value in this part.
        keys: where a path has no value, the keys that records have there.
    """

    records: int = 0
    looks: list[Look] = field(default_factory=list)
    named: set[str] = field(default_factory=set)
    unmatched: list[int] = field(default_factory=list)
    keys: dict[str, set[str]] = field(default_factory=dict)


class UsedColumns:
    """Which keys of the records are read.

    Args:
        mapping: None for the native formats.
        fields: the columns that options name.
        is_part: whether the records are one part of the data, to be merged.

    Attributes:
        read: columns that the paths read.
        beside: keys beside those that are read in objects, as "input.system", by the number of records.
        with_messages: columns with a list of messages.
    """

    def __init__(self, mapping: Mapping | None, fields: FeedbackFields, *, is_part: bool = False) -> None:
        self._mapping, self._fields = mapping, fields
        self._looks: dict[object, Look] | None = {} if is_part else None
        self._named: set[str] = set()
        self._label = None if mapping is None else mapping.turns.label if mapping.turns is not None else mapping.label
        self._paths = _paths_in(mapping) if mapping is not None else _paths_of(fields)
        weight, self._votes = fields.weight, [] if fields.label is None else [_counts_at(fields.label)]
        if mapping is not None:
            weight, self._votes = mapping.weight, [] if self._label is None else _votes_in(self._label)
        self._weight = [] if weight is None else [weight]
        option = fields.label if mapping is None else None if self._label is None else self._label.path
        self._objectives = [] if option is None or any(self._votes) else [*_members_of(option).values()]
        self._needed = [*self._weight, *(path for pair in self._votes for path in pair), *self._objectives]
        self._unmatched = [*self._needed] if mapping is None else [*self._paths, *_paths_of_turns(mapping)]
        self._of_mapping = [*self._unmatched] if mapping is not None else []
        self._unmatched += [path for path in self._needed if path not in self._unmatched]
        self._all_paths = self._unmatched
        self._keys: dict[str, set[str]] = {path.text: set() for path in self._needed}
        self._texts = _paths_of_texts(mapping) if mapping is not None else _paths_of(fields)[:2]
        self._names = {*_MESSAGES} if mapping is None else {name for path in self._texts for name in _names_in(path)}
        self.read: set[str] = set()
        self.beside: Counter[str] = Counter()
        self.with_messages: set[str] = set()
        self._words = {word for path in [*self._paths, *self._unmatched] for word in re.findall(r"\w+", path.text)}
        self._shapes: set[Shape] = set()
        self._records = 0

    def add(self, record: AnyMapping[str, Any]) -> None:
        """Look at the keys of a record."""
        self._records += 1
        shape = self._shape(record)
        if self._is_of_interest(shape, self._records):
            look = self._look(record, shape)
            self._note(look)
            if self._looks is not None:
                self._looks.setdefault(look.content, look).numbers.append(self._records)

    def _is_of_interest(self, shape: Shape, number: int) -> bool:
        return number <= _LOOKED_AT or shape not in self._shapes

    def _shape(self, record: AnyMapping[str, Any]) -> Shape:
        columns = frozenset(key for key, value in record.items() if value is not None)
        texts = [record[name] for name in self._names & columns]
        return columns, frozenset(context_names(texts)), self._keys_of_messages(texts)

    def _keys_of_messages(self, texts: list[Any]) -> frozenset[str]:
        """Return the keys of the messages of the native formats, of which any may be unread."""
        if self._mapping is not None:
            return frozenset()
        messages = [one for value in texts if isinstance(value, list) for one in unusual(value)]
        items = (item for one in messages if isinstance(one, dict) for item in one.items())
        return frozenset(key for key, value in items if not _says_nothing(key, value))

    def _look(self, record: AnyMapping[str, Any], shape: Shape) -> Look:
        found: set[Route] = set().union(*(path.routes(record) for path in self._paths))
        texts: set[Route] = set().union(*(path.routes(record) for path in self._texts))
        roots = {route[0] for route in texts}
        with_messages = {key for key, value in record.items() if _are_messages(value)}
        beside = _beside(record, found)
        if self._mapping is None:
            beside |= _in_lists(record, [name for name in _MESSAGES if name in record], self._words, self._is_unread)
            roots |= with_messages.intersection(_MESSAGES)
        beside |= unread_context(record, roots, found, self._words)
        return Look([], shape, {route[0] for route in found}, beside, with_messages)

    def _note(self, look: Look) -> None:
        self._shapes.add(look.shape)
        self.read |= look.read
        self.beside.update(look.beside)
        self.with_messages |= look.with_messages

    def name(self, column: str) -> None:
        """Note that a column is read whatever the paths say."""
        self.read.add(column)
        self._named.add(column)

    def part(self) -> UsedInPart:
        """Return what one part of the data says, for `merge`."""
        unmatched = [number for number, path in enumerate(self._all_paths) if path in self._unmatched]
        return UsedInPart(self._records, list((self._looks or {}).values()), self._named, unmatched, self._keys)

    def merge(self, later: UsedInPart) -> None:
        """Add what the next part of the data says."""
        for look in later.looks:
            for number in look.numbers:
                if self._is_of_interest(look.shape, self._records + number):
                    self._note(look)
        self._records += later.records
        self.read |= later.named
        still = [self._all_paths[number] for number in later.unmatched]
        self._unmatched = [path for path in self._unmatched if path in still]
        for text, keys in later.keys.items():
            self._keys[text] |= keys

    def _is_unread(self, key: str) -> bool:
        """Return whether a key of a message is read neither here nor by the chat template. Its label may be one of them."""
        if key in MESSAGE_KEYS or key.startswith("message."):
            return False
        return re.search(rf"\b{re.escape(key)}\b", self._fields.rendered.template) is None

    def look_up(self, record: AnyMapping[str, Any], where: str) -> None:
        """Look for values at the mapping's paths, in a record that is complete if several are joined."""
        if not self._unmatched:
            return
        with contextlib.suppress(FeedbackError, LeftOut):  # reported where the rows are read
            data: list[AnyMapping[str, Any]] = [record]
            if self._mapping is not None:
                data += self._mapping.items(record, where)
            if self._mapping is not None and self._mapping.turns is not None:
                turns = self._mapping.turns.messages.open(record, where)
                found = turns.values() if isinstance(turns, dict) else turns if isinstance(turns, list) else []
                data += [one for one in found if isinstance(one, dict)]
            self._unmatched = [path for path in self._unmatched if not _has_value(path, data, where)]
            for path in self._needed:
                if path in self._unmatched:
                    self._keys[path.text].update(key for one in data for key in _object_at(one, _parent(path)))

    def unmatched(self) -> list[Path]:
        """Return the mapping's paths that have no value in any record."""
        return [path for path in self._unmatched if path in self._of_mapping]

    def nowhere(self) -> list[Path]:
        """Return the paths of the weight and of votes that have no value in any record, so that no row can be read."""
        missing = [[path for path in pair if path in self._unmatched] for pair in self._votes]
        # Without both numbers the records are unrated.
        of_votes = [paths[0] for paths in missing if len(paths) == 1]
        return [*(path for path in self._weight if path in self._unmatched), *of_votes]

    def missing_objectives(self) -> list[Path]:
        """Return the paths of objectives, as --label-field names them, that have no value in any record although others have one."""
        missing = [path for path in self._objectives if path in self._unmatched]
        return missing if len(missing) < len(self._objectives) else []

    def keys_beside(self, path: Path) -> list[str]:
        """Return the keys that records have where such a path has none."""
        return sorted(self._keys[path.text])

    def columns(self, forms: Iterable[str], columns: Iterable[str]) -> set[str]:
        """Return the columns that are used.

        Args:
            forms: the native formats of the rows.
            columns: of the file.
        """
        if self._mapping is None:
            return self.read.union(self._fields.read, *(read_in_form(form, self._fields) for form in forms))
        pair = self._mapping.pair
        ratings = set() if pair is None else {*pair.ratings(columns)}
        names = [] if self._label is None or self._label.scores is None else _chosen(self._label)
        scores = {column for column in columns if any(_is_score(column, name) for name in names)}
        turns = self._mapping.turns
        texts = (
            {*TEXT_KEYS, *KEYS_OF_TURNS}
            if turns is not None and turns.text is None and self._mapping.join is not None
            else set()
        )
        return self.read | ratings | scores | texts


def _has_value(path: Path, data: list[AnyMapping[str, Any]], where: str) -> bool:
    for one in data:
        with contextlib.suppress(FeedbackError, LeftOut):
            if path.find(one, where) is not None:
                return True
    return False


def _paths_in(mapping: Mapping) -> list[Path]:
    """Return the paths that read the record, but not those that only recognise it."""
    turns, pair = mapping.turns, mapping.pair
    found = [mapping.where, mapping.system, mapping.tools, mapping.prompt, mapping.completion, mapping.conversation]
    found += [mapping.weight, mapping.each, mapping.join, *mapping.zip.values()]
    if pair is not None:
        found += [pair.first, pair.second, pair.better, *pair.scores]
    label = mapping.label
    if turns is not None:
        found += [turns.messages, turns.rated]
        found += _paths_of_turns(mapping) if mapping.join is not None else ()  # the turns are the records
        label = turns.label if turns.rated is not None else None
    if label is not None:
        found += label.paths
    return [path for path in found if path is not None]


def _paths_of_texts(mapping: Mapping) -> list[Path]:
    """Return the paths to prompts, answers and conversations in the record."""
    turns, pair = mapping.turns, mapping.pair
    found = [mapping.prompt, mapping.completion, mapping.conversation, mapping.each, *mapping.zip.values()]
    found += [] if pair is None else [pair.first, pair.second]
    found += [] if turns is None or mapping.join is not None else [turns.messages]
    return [path for path in found if path is not None]


def _names_in(path: Path) -> Iterator[str]:
    """Yield all names in a path, of which one may be the column that it begins with."""
    for name, word in re.findall(r'"([^"]+)"|(\w+)', path.text):
        yield name or word


def _paths_of_turns(mapping: Mapping) -> list[Path]:
    turns = mapping.turns
    if turns is None:
        return []
    found = [turns.id, turns.parent, turns.role, turns.text, turns.children, turns.rank]
    if turns.label is not None and turns.rated is None:
        found += turns.label.paths
    return [path for path in (*found, *(path for _, path in turns.leave_out)) if path is not None]


def _votes_in(label: LabelPaths) -> list[list[Path]]:
    """Return the paths of both numbers of votes, of each objective that has them."""
    own = [*label.votes.values()] or ([] if label.path is None else _counts_at(label.path))
    return [own, *(pair for one in label.objectives.values() for pair in _votes_in(one))]


def _counts_at(label: Path) -> list[Path]:
    """Return the paths of both numbers in a path such as `{up: UpVotes, down: DownVotes}`; empty for any other."""
    found = _members_of(label)
    return [*found.values()] if tuple(found) in (*COUNTS, *(names[::-1] for names in COUNTS)) else []


def _members_of(label: Path) -> dict[str, Path]:
    """Return the paths in one that makes an object of plain paths, by their names; empty for any other."""
    found = dict(_MEMBER.findall(label.text)) if _OBJECT.fullmatch(label.text.strip()) else {}
    return {name: option_path(text, label.source) for name, text in found.items()}


def _parent(path: Path) -> Route:
    """Return the keys above the last one of a path of names; none for any other path."""
    names = path.text.split(".")
    return tuple(names[:-1]) if all(name.isidentifier() for name in names) else ()


def _paths_of(fields: FeedbackFields) -> list[Path]:
    return [path for path in (fields.prompt, fields.completion, fields.label, fields.weight) if path is not None]


def _chosen(label: LabelPaths) -> list[str]:
    return label.names(label.seen)


def _is_score(column: str, name: str) -> bool:
    """Return whether a column belongs to a score, also as "feedback.thumb", "stats.thumb.avg" or "thumb.responses"."""
    return f".{name}." in f".{column}."


def _beside(record: AnyMapping[str, Any], found: set[Route]) -> set[str]:
    """Return the keys with a value beside those that are read."""
    whole = {route[:size] for route in found for size in range(1, len(route) + 1)}
    last = {route[:-1] for route in found}
    read = {route[-1] for route in found if opened_at(record, route) is not None}  # the answers may repeat them
    names = set()
    for parent in whole - found:
        if any(parent[:size] in found for size in range(1, len(parent))):
            continue
        for key, item in _object_at(record, parent).items():
            name = ".".join((*parent, str(key)))
            if is_context(key) and key in read:
                continue
            if parent in last and (*parent, key) not in whole and item not in (None, "", [], {}):
                names.add(name)
    return names


def _are_messages(value: object) -> bool:
    """Return whether a value is a list of messages, also as JSON text."""
    if isinstance(value, str):
        return begins_with_roles(value)
    if not isinstance(value, list | tuple) or not value:
        return False
    return isinstance(value[0], dict) and ("role" in value[0] or "from" in value[0])


def _in_lists(
    record: AnyMapping[str, Any], columns: Iterable[str], words: set[str], is_unread: Callable[[str], bool]
) -> set[str]:
    """Return the keys of the messages in some columns that are not read, as "messages[].comment".

    Args:
        words: names in the paths; a key with one of them is read.
    """
    names = set()
    for column in columns:
        items = opened_at(record, (column,))
        for item in items if isinstance(items, list) else []:
            for key, value in item.items() if isinstance(item, dict) else ():
                if key in words or _says_nothing(key, value):
                    continue
                if changes_a_message(key) or is_unread(key):
                    names.add(f"{column}[].{key}")
    return names


def _says_nothing(key: object, value: object) -> bool:
    """Return whether a key of a message says nothing: it is empty, a flag that is not set, or the usual weight."""
    if value is False:
        return key not in VERDICTS
    return value in (None, "", [], {}) or (key == "weight" and value == 1)


def _object_at(record: AnyMapping[str, Any], route: Route) -> dict[str, Any]:
    inner = opened_at(record, route)
    return inner if isinstance(inner, dict) else {}
