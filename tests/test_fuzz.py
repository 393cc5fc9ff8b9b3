"""Whatever stands in a file from elsewhere: what reads it ends in a result or in one of our own errors.

Each target is a plain function that takes what was drawn; `tests/fuzz_by_hand.py` feeds the same functions with
atheris. `FUZZ_TIMES=20 python -m pytest tests/test_fuzz.py` draws twenty times as many examples.
"""

import atexit
import contextlib
import copy
import functools
import gzip
import hashlib
import io
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import traceback
from pathlib import Path
from unittest import mock

import app_exports
import forks
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from feedback_files import chat_rows
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from models import CHAT_TEMPLATE, tiny_tokenizer
from test_manifest import make_cache
from test_shards import ROWS

from offline_kto.kto_core.cache import verified_shards
from offline_kto.kto_core.cache.labels_hash import labels_hash_of
from offline_kto.kto_core.cache.manifest import MANIFEST, checksum, differences, fingerprint, identity_of, read_manifest
from offline_kto.kto_core.cache.row_rules import check_table
from offline_kto.kto_core.cache.shards import open_shard, read_metadata, shard_name
from offline_kto.kto_core.errors import CacheError, ConfigError, FeedbackError, KTOError, ModelError, TokenizationError
from offline_kto.kto_core.feedback.columns import FeedbackFields
from offline_kto.kto_core.feedback.labels import LabelRule
from offline_kto.kto_core.feedback.left_out import LeftOut
from offline_kto.kto_core.feedback.message_keys import REASONING
from offline_kto.kto_core.feedback.presets import recognised
from offline_kto.kto_core.feedback.rating_threshold import resolve_threshold
from offline_kto.kto_core.feedback.records import parse_record
from offline_kto.kto_core.feedback.tokenization import tokenize_rows
from offline_kto.kto_core.hashing import weights_hash
from offline_kto.kto_core.options import resolve
from offline_kto.precompute import inspect_cache
from offline_kto.precompute.config import PrecomputeConfig
from offline_kto.precompute.feedback.rows import Feedback
from offline_kto.precompute.records import class_names
from offline_kto.precompute.records.sources import describe_source, read_records
from offline_kto.train.config import TrainConfig
from offline_kto.train.data.cache_rows import CacheRows, RowKey
from offline_kto.train.data.repeated_rows import repeated_rows

TIMES = int(os.environ.get("FUZZ_TIMES", "1"))
ROOT = Path(__file__).resolve().parents[1]
SECONDS = 10  # for one file of a few kilobytes
MEMORY = 2 * 2**30  # bytes that one such file may make the process ask for
LONGEST_MESSAGE = 1000


def drawn(count, *strategies):
    """Run a test with `count` examples in `make test-slow`, and with two fifths of them in `make test`."""

    def of_target(target):
        few, every = (
            settings(max_examples=most * TIMES, suppress_health_check=list(HealthCheck))(given(*strategies)(target))
            for most in (count * 2 // 5, count)
        )

        @pytest.mark.parametrize("test", [few, pytest.param(every, marks=pytest.mark.slow)], ids=["few", "all"])
        def run(test):
            test()

        return run

    return of_target


# What holds for every target


class TooSlow(BaseException):
    """Not an Exception: no handler between here and the target may take it for one of its own."""


@contextlib.contextmanager
def bounded():
    """Stop what takes forever, and what asks for far more memory than a small file can need."""

    def stop(number, frame):
        raise TooSlow

    limits = resource.getrlimit(resource.RLIMIT_AS)
    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        if sys.platform == "linux":
            pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
            resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY, limits[1]))
        yield
    except TooSlow:
        raise AssertionError(f"not done after {SECONDS} seconds") from None
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        resource.setrlimit(resource.RLIMIT_AS, limits)


class _Watch:
    """What Python tells of files opened, processes started, connections made and pickles loaded."""

    FORBIDDEN = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork", "pickle.find_class")
    LIBRARIES = tuple(str(Path(p).resolve()) for p in {sys.prefix, sys.base_prefix, os.__file__ + "/.."})

    def __init__(self):
        self.folder = None
        self.seen = []
        sys.addaudithook(self.hear)

    def hear(self, event, args):
        if self.folder is None:
            return
        if event == "open" and isinstance(args[0], str | bytes) and not self.is_allowed(os.fsdecode(args[0])):
            self.seen.append(f"open {args[0]!r}")
        elif event in self.FORBIDDEN or event.startswith("socket.connect"):
            self.seen.append(event)

    def is_allowed(self, path):
        real = os.path.realpath(path)
        code = real.startswith((*self.LIBRARIES, str(ROOT))) and "__pycache__" in real + "__pycache__" * real.endswith(
            ".py"
        )
        own = os.path.realpath(verified_shards.own_files())  # what was verified is remembered there
        # The names of classes are looked for in the folders above, as in a data set whose files are in data/.
        notes = Path(real).name in class_names.NOTES and Path(real).parent in self.folder.parents
        return (
            code
            or notes
            or real.startswith((*self.LIBRARIES, str(self.folder), own, "/proc/self", "/usr/share/zoneinfo"))
        )


@functools.cache
def watch():
    return _Watch()


@contextlib.contextmanager
def nothing_but(folder):
    """Fail where anything outside of `folder` is opened, or anything is started."""
    watch().folder, watch().seen = folder.resolve(), []
    try:
        yield
    finally:
        watch().folder = None
    assert watch().seen == []


def assert_printable(text):
    """Data must not drive the terminal: no escape sequence, carriage return, reversed text or half character."""
    assert [c for c in text if not c.isprintable() and c != "\n"] == []


def attempts(calls, kind, folder, name=""):
    """Return for each call whether it worked, and what it gave. An error must be of `kind`, in one short printable line.

    folder: nothing outside of it may be opened; name: what the error has to name. The limits hold for all calls.
    """
    printed, results, errors = io.StringIO(), [], []
    with bounded(), nothing_but(folder), contextlib.redirect_stdout(printed):
        for call in calls:
            try:
                results.append((True, call()))
            except kind as error:
                errors.append(error)
                results.append((False, None))
    for message in map(str, errors):
        assert_printable(message)
        assert "\n" not in message
        assert name in message
        assert len(message) < LONGEST_MESSAGE + len(str(folder))
    assert_printable(printed.getvalue())
    return results


def attempt(call, kind, folder, name=""):
    """One call, as `attempts` makes many."""
    return attempts([call], kind, folder, name)[0]


def where_ours(error):
    """`shards.py:95`, the last line of this project that an error came through."""
    frames = [*traceback.extract_tb(error.__traceback__)]
    if error.__context__ is not None:
        frames += traceback.extract_tb(error.__context__.__traceback__)
    ours = [frame for frame in frames if {"kto_core", "precompute", "train"} & {*Path(frame.filename).parts}]
    return f"{Path(ours[-1].filename).name}:{ours[-1].lineno}" if ours else "in the test"


@functools.cache
def room():
    """A folder that lasts as long as the process."""
    folder = Path(tempfile.mkdtemp(prefix="fuzz"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


# What is drawn

DRIVES_TERMINALS = "\x1b[31m\u202e\x85\r\x00"
WORDS = [
    *("", " ", "hello", "4", "true", "good", "median", "9" * 400, "a" * 300, "nan"),
    *("user", "assistant", "system", "tool", "human", "gpt", "text"),
    *("\n\nAssistant: a", "\n\nHuman: q\n\nAssistant: b", "<|im_end|>", "</s>", "{{ 7 * 7 }}", "{% for %}"),
    *(DRIVES_TERMINALS, "\x1b]0;title\x07", "\ud800", "\u2028", "\ufeff", "\U0001f44d"),
    *(
        "../../etc/passwd",
        "/etc/passwd",
        "C:\\x",
        "train/../../x",
        "train/00000.parquet",
        ".",
        "~",
        "http://localhost/x",
    ),
]
NUMBERS = [0, 1, -1, 2, 40, 2**31, 2**63, -(2**64), 10**400, -(10**400), 10**4200, 0.5, 1.5, 1e308, -0.0]
ODD_NUMBERS = [float("inf"), float("-inf"), float("nan")]
# Stand for what json.dumps cannot write, and for what would be long to show.
DEEP, DIGITS, TABLES, LONG = "@deep@", "@digits@", "@tables@", "@long@"

texts = st.one_of(st.sampled_from(WORDS), st.text(max_size=12))
scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.sampled_from([*NUMBERS, *ODD_NUMBERS, DEEP, DIGITS]),
    texts,
)


def json_values(keys=texts, leaves=scalars):
    return st.recursive(
        leaves, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(keys, inner, max_size=4), max_leaves=8
    )


def as_json(value, depth=100_000, digits=5000):
    text = json.dumps(value).replace(f'"{DEEP}"', "[" * depth + "]" * depth)
    return text.replace(f'"{DIGITS}"', "9" * digits)


def written_out(content, depth=100_000, digits=5000):
    """Return the bytes that a short form of something long represents."""
    content = content.encode("utf-8", "surrogatepass") if isinstance(content, str) else content
    for mark, meant in ((DEEP, "[" * depth), (DIGITS, "9" * digits), (TABLES, "{a: " * depth), (LONG, "a" * depth)):
        content = content.replace(mark.encode(), meant.encode())
    return content


depths = st.sampled_from([3, 100, 900, 960, 980, 985, 990, 995, 1000, 100_000])
digit_counts = st.sampled_from([20, 309, 4299, 4300, 4301, 10_000])

# (what to do, where: a share of the bytes, how many, with what)
byte_edits = st.lists(
    st.tuples(
        st.sampled_from(["flip", "cut", "insert", "repeat", "end"]),
        st.floats(0, 1, exclude_max=True),
        st.integers(1, 40),
        st.binary(min_size=1, max_size=8),
    ),
    min_size=1,
    max_size=4,
)


def with_edits(content, edits):
    for action, share, count, new in edits:
        at = int(share * len(content))
        if action == "flip":
            content = content[:at] + bytes(b ^ new[0] for b in content[at : at + 1]) + content[at + 1 :]
        elif action == "cut":
            content = content[:at] + content[at + count :]
        elif action == "insert":
            content = content[:at] + new + content[at:]
        elif action == "repeat":
            content = content[:at] + content[at : at + count] * 3 + content[at + count :]
        else:
            content = content[:at]
    return content


# (what to do, which place of all, a new key, a new value)
value_edits = st.lists(
    st.tuples(st.sampled_from(["replace", "replace", "delete", "add"]), st.integers(0, 500), texts, json_values()),
    min_size=1,
    max_size=3,
)


def places(value):
    """(container, key) of everything inside of `value`."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [place for key, inner in items for place in [(value, key), *places(inner)]]


def changed(content, edits):
    content = copy.deepcopy(content)
    for action, index, key, value in edits:
        inside = places(content)
        if not inside:
            break
        container, at = inside[index % len(inside)]
        if action == "replace":
            container[at] = value
        elif action == "delete":
            del container[at]
        elif isinstance(container, dict):
            container[key] = value
        else:
            container.insert(at, value)
    return content


# Feedback

KEYS = [
    *("prompt", "completion", "label", "messages", "conversations", "chosen", "rejected", "rating", "instruction"),
    *("input", "output", "history", "system", "kto_tag", "role", "content", "from", "value", "tools", "tool_calls"),
    *(
        "split",
        "system_prompt",
        "score",
        "metadata",
        "chat_template_kwargs",
        "images",
        "text",
        "type",
        "data",
        DRIVES_TERMINALS,
    ),
]
SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".jsonl.gz", ".json.gz", ".csv.gz")
USER, ANSWER = {"role": "user", "content": "hello"}, {"role": "assistant", "content": "world"}
VALID = [
    {"prompt": "hello", "completion": "world", "label": True},
    *chat_rows(3),
    {"messages": [USER, ANSWER], "label": False},
    {"conversations": [{"from": "human", "value": "hello"}, {"from": "gpt", "value": "world"}], "kto_tag": True},
    {"instruction": "hello", "input": "he", "output": "world", "history": [["a", "b"]], "label": "good"},
    {"prompt": "hello", "chosen": "well", "rejected": "or"},
    {"chosen": [USER, ANSWER], "rejected": [USER, {"role": "assistant", "content": "or"}]},
    {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant: c"},
    {"prompt": "hello", "completion": "world", "rating": 4, "label": 1},
    {
        "messages": [
            USER,
            {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]},
            {"role": "tool", "content": "4"},
            {"role": "assistant", "content": [{"type": "text", "text": "four"}]},
        ],
        "tools": [{"type": "function", "function": {"name": "f"}}],
        "chat_template_kwargs": {"mood": "glad"},
        "label": "\U0001f44d",
    },
    {
        "messages": [
            USER,
            {"role": "assistant", "content": [{"type": "tool_use", "id": "1", "name": "f", "input": {"x": 1}}]},
            {
                "role": "user",
                "content": [{"type": "tool_result", "tool_use_id": "1", "content": [{"type": "text", "text": "4"}]}],
            },
            ANSWER,
        ],
        "label": True,
    },
    {
        "prompt": [{"type": "human", "data": {"content": "hello", "additional_kwargs": {"tool_calls": []}}}],
        "completion": [{"message.role": "assistant", "message.contents": [{"message_content.text": "world"}]}],
        "label": False,
    },
]
EXPORTS = {name: case for name, case in app_exports.CASES.items() if not isinstance(case.records, str)}
FRAGMENTS = [
    *b'{ } [ ] , : " \\ "prompt": "completion": "label": "messages": "hello" true null NaN -Infinity 1e999'.split(),
    *b'{"data":[ "\\ud800" prompt,completion,label a,b,true PAR1 @deep@ @digits@ @long@'.split(),
    *(b"\n", b"\r", b"\r\n", b"\t", b" ", b"\x00", b"\x1b[31m", b"\x1f\x8b"),
    *(b"\xff", b"\xc3", b"\xef\xbb\xbf", b"\xff\xfe", b"\xed\xa0\x80", b"\xe2\x80\xae"),
    *(json.dumps(row).encode() + b"\n" for row in VALID[:5]),
]

# A template as models have them: it refuses what it does not know, and says what that was.
STRICT_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] not in ('system', 'user', 'assistant', 'tool') %}"
    "{{ raise_exception('Unexpected role: ' + message['role']) }}{% endif %}{% endfor %}" + CHAT_TEMPLATE
)


@functools.cache
def tokenizers():
    return [
        tiny_tokenizer(),
        tiny_tokenizer(chat_template=STRICT_TEMPLATE),
        tiny_tokenizer(chat_template=None, bos=True),
    ]


def said_in(turn):
    return "".join(turn[name] for name in ("content", *REASONING) if isinstance(turn.get(name), str)).strip()


def says_something(turns):
    if isinstance(turns, str):
        return turns.strip() != ""
    return len(turns) > 0 and all(
        isinstance(turn["content"], str) and (turn["role"] == "tool" or "tool_calls" in turn or said_in(turn))
        for turn in turns
    )


def read_feedback(path, most=30):
    """Every step from the file to tokens; a row that is refused does not hide those behind it."""
    good, records = attempt(lambda: read_records(str(path), limit=most), FeedbackError, room(), path.name)
    attempt(lambda: describe_source(str(path)), FeedbackError, room(), path.name)
    attempt(lambda: resolve_threshold("median", read_records(str(path), limit=most)), KTOError, room())
    for on_bad_row in ("skip", "error"):
        read_as_a_whole(path, on_bad_row=on_bad_row, limit=most)
    while good:
        good, item = attempt(lambda: next(records, None), FeedbackError, room(), path.name)
        if item is None:
            return
        where, record = item
        assert_printable(where)
        assert where.startswith(path.name + ":")
        assert isinstance(record, dict)
        use_record(record, path)


def rows_of(record, where, fields):
    try:
        return parse_record(record, where, fields)
    except LeftOut as left:
        assert_printable(str(left))
        return []


def assert_row(row):
    assert isinstance(row.label, bool)
    assert says_something(row.completion)


def read_as_a_whole(path, **options):
    """Read a file as `kto-precompute` does: in one of all formats, with rows that are left out in a file of their own."""
    left = room() / "left.jsonl"
    left.unlink(missing_ok=True)
    config = PrecomputeConfig(model="m", data=str(path), left_out=left, one_class=True, **options)
    recognised({}, "")  # reads the formats, which stand outside of the room
    with bounded(), nothing_but(room()):
        try:
            feedback = Feedback(config, has_template=True)
            try:
                for row in feedback.rows():
                    assert_row(row)
                    feedback.keep(row)
            finally:
                feedback.write_left_out()
            feedback.finish()
        except KTOError as error:
            message = str(error)
            assert_printable(message)
            assert path.name in message
            assert all(len(line) < LONGEST_MESSAGE + len(str(room())) for line in message.splitlines())
            assert len(message.splitlines()) < 30
        else:
            assert_printable("".join(feedback.notes()))
    for line in left.read_text(encoding="utf-8").splitlines() if left.exists() else ():
        assert_printable(line)
        assert json.loads(line)["where"].startswith(path.name)


def use_record(record, path):
    where = f"{path.name}:17"
    for fields in (FeedbackFields(chat=True), FeedbackFields(), FeedbackFields(rule=LabelRule.at_least(4.0))):
        parsed, rows = attempt(functools.partial(rows_of, record, where, fields), FeedbackError, room(), path.name)
        for row in rows if parsed else ():
            assert_row(row)
            for tokenizer in tokenizers():
                fits, tokens = attempt(
                    functools.partial(tokenize_rows, [row], tokenizer), TokenizationError, room(), path.name
                )
                if fits:
                    assert len(tokens[0].prompt_ids) > 0
                    assert len(tokens[0].completion_ids) > 0


def feedback_file(content, suffix):
    folder = room() / "feedback"
    folder.mkdir(exist_ok=True)
    path = folder / f"f{suffix}"
    path.write_bytes(content)
    return path


def feedback_from_bytes(content, suffix, packed=True):
    content = written_out(content)
    if suffix.endswith(".gz") and packed:
        content = gzip.compress(content, compresslevel=1)
    read_feedback(feedback_file(content, suffix))


def feedback_from_records(records, depth=900, digits=4299):
    lines = "".join(as_json(record, depth, digits) + "\n" for record in records)
    read_feedback(feedback_file(lines.encode(), ".jsonl"))


def export_from_edits(name, edits, depth=900, digits=4299):
    content = as_json(changed(EXPORTS[name].records, edits), depth, digits)
    for on_bad_row in ("skip", "error"):
        read_as_a_whole(feedback_file(content.encode(), ".json"), on_bad_row=on_bad_row, **EXPORTS[name].options)


@functools.cache
def valid_file(suffix):
    if suffix == ".parquet":
        rows = [{"prompt": [USER], "completion": [ANSWER], "label": True}]
        rows += [{"prompt": [USER, ANSWER, USER], "chosen": "a", "rejected": "b"}]
        rows += [{"messages": [USER, ANSWER], "label": False, "source": {"at": i, "tags": ["x"]}} for i in range(9)]
        names = sorted({name for row in rows for name in row})
        rows = [{name: row.get(name) for name in names} for row in rows]
        pq.write_table(pa.Table.from_pylist(rows), room() / "valid.parquet", compression="none")
        return (room() / "valid.parquet").read_bytes()
    lines = [json.dumps(row) for row in VALID]
    plain = suffix.removesuffix(".gz")
    delimiter = "\t" if plain == ".tsv" else ","
    table = [["prompt", "completion", "label", "messages"], ["hello", '"world"', "true", ""]]
    table += [["", "", "no", '"' + json.dumps([USER, ANSWER]).replace('"', '""') + '"']]
    content = {
        ".jsonl": "\n".join(lines) + "\n",
        ".json": "[\n" + ",\n".join(lines) + "]\n",
    }.get(plain, "".join(delimiter.join(cells) + "\n" for cells in table))
    return gzip.compress(content.encode(), mtime=0) if suffix.endswith(".gz") else content.encode()


@drawn(
    150,
    st.one_of(st.binary(max_size=60), st.lists(st.sampled_from(FRAGMENTS), max_size=9).map(b"".join)),
    st.sampled_from(SUFFIXES),
    st.booleans(),
)
def test_any_bytes_as_feedback_end_in_rows_or_in_our_own_error(content, suffix, packed):
    feedback_from_bytes(content, suffix, packed)


@drawn(150, st.sampled_from(SUFFIXES), byte_edits)
def test_a_damaged_feedback_file_ends_in_rows_or_in_our_own_error(suffix, edits):
    feedback_from_bytes(with_edits(valid_file(suffix), edits), suffix, packed=False)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_the_feedback_files_that_are_damaged_here_are_good_ones(suffix):
    path = feedback_file(valid_file(suffix), suffix)
    rows = [row for where, record in read_records(str(path)) for row in parse_record(record, where, FeedbackFields())]
    assert len(rows) >= 2


roles = st.sampled_from(["user", "user", "assistant", "assistant", "system", "tool", DRIVES_TERMINALS])
messages = st.lists(
    st.fixed_dictionaries(
        {"role": roles | json_values(), "content": texts | json_values()},
        optional={"tool_calls": json_values(), "name": texts},
    ),
    max_size=4,
)
sides = st.one_of(messages, texts, json_values())
likely_records = st.fixed_dictionaries(
    {},
    optional={
        **dict.fromkeys(("prompt", "completion", "chosen", "rejected", "messages", "conversations"), sides),
        **dict.fromkeys(("instruction", "input", "output", "system"), texts),
        "label": st.booleans() | scalars,
        "rating": scalars,
        "split": st.just("train") | texts,
        "tools": st.none() | json_values(),
        "chat_template_kwargs": st.none() | st.dictionaries(st.sampled_from(["mood", "tools", "x"]), json_values()),
    },
)


@drawn(
    150,
    st.lists(
        st.one_of(
            likely_records,
            st.tuples(st.sampled_from(VALID), value_edits).map(lambda drawn: changed(*drawn)),
            st.dictionaries(st.sampled_from(KEYS), json_values(st.sampled_from(KEYS)), max_size=5),
            json_values(st.sampled_from(KEYS)),
        ),
        min_size=1,
        max_size=3,
    ),
    depths,
    digit_counts,
)
def test_any_records_as_feedback_end_in_rows_or_in_our_own_error(records, depth, digits):
    feedback_from_records(records, depth, digits)


@drawn(150, st.sampled_from(sorted(EXPORTS)), value_edits, depths, digit_counts)
def test_a_changed_export_ends_in_rows_or_in_our_own_error(name, edits, depth, digits):
    export_from_edits(name, edits, depth, digits)


@pytest.mark.parametrize("name", sorted(EXPORTS))
def test_the_exports_that_are_changed_here_are_good_ones(name):
    path = feedback_file(json.dumps(EXPORTS[name].records).encode(), ".json")
    feedback = Feedback(PrecomputeConfig(model="m", data=str(path), **EXPORTS[name].options), has_template=True)
    assert list(feedback.rows())


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_the_name_of_a_feedback_file_cannot_drive_the_terminal(suffix):
    """It may come out of an archive."""
    path = feedback_file(b"{", "-\x1b[31m\u202e" + suffix)
    with pytest.raises(FeedbackError) as caught:
        list(read_records(str(path)))
    assert_printable(str(caught.value))


def test_what_a_template_says_of_a_record_cannot_drive_the_terminal():
    record = {"prompt": [{"role": DRIVES_TERMINALS, "content": "hello"}], "completion": [ANSWER], "label": True}
    use_record(record, room() / "f.jsonl")


def test_a_record_cannot_bring_a_chat_template_of_its_own():
    """The cache is named after the model's template; and another one is a program, which may run for ever."""
    for template in ("{{ messages[0]['content'] }}{% if messages[1] %}other{% endif %}", "{{ 'a' * 3000000000 }}"):
        record = {
            "prompt": [USER],
            "completion": [ANSWER],
            "label": True,
            "chat_template_kwargs": {"chat_template": template},
        }
        with pytest.raises((FeedbackError, TokenizationError), match="chat_template"), bounded():
            tokenize_rows(parse_record(record, "f.jsonl:1", FeedbackFields()), tokenizers()[0])


def test_a_table_with_very_many_columns_is_read_or_refused_soon():
    header = ",".join(f"column{number}" for number in range(60_000))
    feedback_from_bytes(f"{header}\n1,2\n".encode(), ".csv")


def test_a_packed_line_of_a_thousand_million_letters_is_refused():
    """A megabyte on disk."""
    path = feedback_file(gzip.compress(b"a" * 2**20) * 1024, ".jsonl.gz")
    good, _ = attempt(lambda: list(read_records(str(path))), FeedbackError, room(), path.name)
    assert not good


# Manifests


@functools.cache
def _valid():
    """(folder, manifest) of a small cache whose manifest holds all that kto-precompute writes."""
    folder = make_cache(room() / "refs")
    path = folder / MANIFEST
    content = json.loads(path.read_text(encoding="utf-8"))
    labels = [row["label"] for row in ROWS[:40]]
    content["data"].update(desirable=sum(labels), undesirable=len(labels) - sum(labels), truncated=0, kl_truncated=0)
    hashed = labels_hash_of([folder / shard["file"] for shard in content["shards"]], content.get("columns", []))
    content["data"].update(dropped={"prompt_too_long": 1}, labels_hash=hashed, prompts=20, sequences=120, tokens=900)
    content["reference"]["vocabulary"] = 97
    content["run"].update(reused_sequences=0, tokens_per_second=100)
    content["checksum"] = checksum(content)
    return folder, content


def valid_cache():
    return _valid()[0]


def valid_manifest():
    return _valid()[1]


def manifest_from_bytes(content):
    """Every reader of a manifest, in the folder of good shards."""
    folder = valid_cache()
    (folder / MANIFEST).write_bytes(written_out(content))
    readable, manifest = attempt(lambda: read_manifest(folder), CacheError, folder, folder.name)
    attempt(lambda: inspect_cache.info(folder), CacheError, folder, folder.name)
    attempt(lambda: inspect_cache.verify(folder), CacheError, folder, folder.name)
    use_rows(folder)
    if readable:
        assert_printable("".join(differences(manifest.identity, {})))
        assert all(isinstance(name + value, str) for name, value in inspect_cache.describe(manifest))
        for shard in manifest.shards:
            assert (folder / shard["file"]).resolve().is_relative_to(folder.resolve())
        # It names the model, and with it where the tokenizer is looked for.
        attempt(lambda: list(inspect_cache.head(folder, rows=1, model=None)), KTOError, Path("/"))
        attempt(lambda: head(folder), CacheError, folder, folder.name)


def use_rows(folder):
    """Ask a cache for everything that training reads, before and while it goes over the rows."""
    readable, rows = attempt(lambda: CacheRows(folder), CacheError, folder, folder.name)
    if readable:
        assert 0 <= rows.largest_id < 2**31
        attempt(lambda: repeated_rows(rows, most=0), CacheError, folder, folder.name)
        keys = [RowKey(index, partner) for index in range(len(rows)) for partner in range(min(rows.partners, 9))]
        attempts([functools.partial(rows.__getitem__, key) for key in keys], CacheError, folder, folder.name)


def manifest_from_value(value, depth=900, digits=4299, *, marked=True):
    """marked: with the fingerprint and the count that belong to the content, as somebody who means harm writes it."""
    text = as_json(value, depth, digits)
    if marked:
        with contextlib.suppress(ValueError, RecursionError, KeyError, TypeError, AttributeError):
            content = json.loads(text)
            content["fingerprint"] = fingerprint(
                identity_of(content), content["pairing"], str(content["data"].get("rows_hash"))
            )
            content["data"]["kept"] = sum(shard["rows"] for shard in content["shards"])
            content["checksum"] = checksum(content)
            text = json.dumps(content)
    manifest_from_bytes(text.encode())


@drawn(60, st.one_of(st.binary(max_size=60), st.lists(st.sampled_from(FRAGMENTS), max_size=9).map(b"".join)))
def test_any_bytes_as_a_manifest_are_refused_by_our_own_error(content):
    manifest_from_bytes(content)


@drawn(60, json_values(st.sampled_from(["format", "shards", "data", "run", "file", "rows"])), depths, digit_counts)
def test_any_json_as_a_manifest_is_refused_by_our_own_error(value, depth, digits):
    manifest_from_value(value, depth, digits)


@drawn(250, value_edits, depths, digit_counts, st.booleans())
def test_a_changed_manifest_is_taken_or_refused_by_our_own_error(edits, depth, digits, marked):
    manifest_from_value(changed(valid_manifest(), edits), depth, digits, marked=marked)


@drawn(60, byte_edits)
def test_a_damaged_manifest_is_taken_or_refused_by_our_own_error(edits):
    manifest_from_bytes(with_edits(json.dumps(valid_manifest()).encode(), edits))


def test_the_manifest_that_is_changed_here_is_a_good_one():
    manifest_from_value(valid_manifest())
    inspect_cache.verify(valid_cache())
    assert len(CacheRows(valid_cache())) == 40


# Every place of the manifest that a reader looks at, with each kind of value that does not belong there.
WRONG = {
    **{"null": None, "text": DRIVES_TERMINALS, "negative": -1, "zero": 0, "huge": 10**400, "half": 0.5},
    **{
        "infinite": float("inf"),
        "list": [1],
        "table": {DRIVES_TERMINALS: DRIVES_TERMINALS},
        "deep": DEEP,
        "true": True,
    },
}


@pytest.mark.parametrize("every", [3, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("number", "wrong"), [*enumerate(WRONG.values())], ids=WRONG.keys())
def test_no_value_of_the_manifest_is_trusted(number, wrong, every):
    """One after the other, not only those that happen to be drawn; or every third place, from another one for each value."""
    failures = []
    for index in range(number % every, len(places(valid_manifest())), every):
        content = copy.deepcopy(valid_manifest())
        container, key = places(content)[index]
        container[key] = wrong
        try:
            manifest_from_value(content, marked=key not in ("kept", "fingerprint"))
        except Exception as error:  # noqa: BLE001 - all of them are shown together
            place = path_to(content, container, key)
            failures.append(f"{place}: {type(error).__name__} {str(error)[:90]!r} {where_ours(error)}")
    assert failures == [], "\n".join(failures)


def path_to(content, container, key):
    """`data.files.0.name`, for the failure's message."""
    if content is container:
        return str(key)
    items = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    inner = ((name, path_to(value, container, key)) for name, value in items)
    return next((f"{name}.{rest}" for name, rest in inner if rest is not None), None)


# Shards


def damage(data, number):
    """Shard `number` of many that are broken each in its own way; the last bytes, where the footer lies, more often."""
    rng = random.Random(number)
    for _ in range(rng.choice((1, 1, 2, 5, 20))):
        low = 0 if rng.random() < 0.5 else max(0, len(data) - 4000)
        at = rng.randrange(low, len(data))
        kind = rng.randrange(6)
        if kind < 3:
            data = data[:at] + bytes([data[at] ^ (1 << rng.randrange(8))]) + data[at + 1 :]
        elif kind == 3:
            data = data[:at] + bytes([rng.choice((0, 1, 127, 128, 255))]) + data[at + 1 :]
        elif kind == 4:
            data = data[:at] + rng.randbytes(rng.randint(1, 9)) + data[at:]
        else:
            data = data[:at] + data[at + rng.randint(1, 40) :]
    return data


def shard_from_bytes(data):
    """A cache whose manifest has the right length and hash of a shard that is wrong."""
    folder = valid_cache()
    path = folder / shard_name(0)
    good = path.read_bytes()
    content = copy.deepcopy(valid_manifest())
    content["shards"][0].update(bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
    (folder / MANIFEST).write_text(json.dumps(content), encoding="utf-8")
    path.write_bytes(data)
    try:
        assert isinstance(read_metadata(path), dict | None)
        readable, file = attempt(lambda: open_shard(path), CacheError, folder, path.name)
        if readable:
            with contextlib.suppress(OSError, ValueError, pa.ArrowException):  # pyarrow's own, called by the test
                table = file.read()
                attempt(lambda: check_table(table, str(path)), CacheError, folder, path.name)
        attempt(lambda: inspect_cache.verify(folder), CacheError, folder, folder.name)
        attempt(lambda: head(folder), CacheError, folder, folder.name)
        use_rows(folder)
    finally:
        path.write_bytes(good)


def head(folder):
    """The first rows as text, with a tokenizer that is there already."""
    with mock.patch.object(inspect_cache, "_tokenizer", return_value=tokenizers()[0]):
        list(inspect_cache.head(folder, rows=9, model=None))


@functools.cache
def shard_variants():
    """The shard as it is written, and one that no compression guards: damage there arrives in the values."""
    path = valid_cache() / shard_name(0)
    plain = room() / "plain.parquet"
    pq.write_table(pq.read_table(path), plain, compression="none", row_group_size=8)
    return path.read_bytes(), plain.read_bytes()


def damage_shards(count):
    """`count` damaged shards; prints each distinct failure with the number that makes it. For a process of its own."""
    failures = {}
    for number in range(count):
        print(f"\rdamage {number}", end="", file=sys.stderr, flush=True)
        try:
            shard_from_bytes(damage(shard_variants()[number % 2], number))
        except Exception as error:  # noqa: BLE001 - all of them are shown together
            place = where_ours(error)
            said = f"{error} {error.__context__ or ''}"[:300]
            failures.setdefault((place, type(error).__name__), []).append((number, said))
    for (place, kind), cases in failures.items():
        print(f"{kind} at {place}: {len(cases)} of {count}; damage {cases[0][0]}: {cases[0][1]!r}")


@pytest.mark.parametrize("count", [60, pytest.param(300, marks=pytest.mark.slow)])
def test_damaged_shards_of_the_right_hash_are_read_or_refused_by_our_own_error(count):
    """In a process of its own, which may die of a bad library without taking the tests along."""
    code = "import faulthandler, warnings\nfaulthandler.enable()\nwarnings.simplefilter('ignore')\n"
    done = forks.run(code + f"import test_fuzz\ntest_fuzz.damage_shards({count * TIMES})", timeout=600 * TIMES)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout == "", done.stdout


CELLS = {
    "an id that drives terminals": ("row_id", DRIVES_TERMINALS),
    "a prompt id that does": ("prompt_id", DRIVES_TERMINALS),
    "a negative token": ("completion_ids", [-5]),
    "a token of no vocabulary": ("completion_ids", [2**31 - 1]),
    "no completion": ("completion_ids", []),
    "too few scores": ("ref_kl_logps", [0.0]),
    "no scores": ("ref_kl_logps", []),
    "no mismatched completions": ("kl_completion_ids", []),
    "a score that is no number": ("ref_logps", float("nan")),
}


@pytest.mark.parametrize(("column", "value"), CELLS.values(), ids=CELLS.keys())
def test_whatever_stands_in_a_shard_it_is_read_or_refused_by_our_own_error(column, value):
    table = pq.read_table(valid_cache() / shard_name(0))
    rows = [{**row, column: value} for row in table.to_pylist()]
    pq.write_table(pa.Table.from_pylist(rows, schema=table.schema), room() / "other.parquet")
    shard_from_bytes((room() / "other.parquet").read_bytes())


@pytest.mark.parametrize("reader", [inspect_cache.verify, CacheRows, head])
def test_a_shard_that_is_a_link_to_elsewhere_is_not_read(tmp_path, reader):
    folder = Path(shutil.copytree(valid_cache(), tmp_path / "refs"))
    (folder / MANIFEST).write_text(json.dumps(valid_manifest()), encoding="utf-8")
    (folder / shard_name(0)).rename(tmp_path / "outside.parquet")
    (folder / shard_name(0)).symlink_to(tmp_path / "outside.parquet")
    with pytest.raises(CacheError, match="outside the cache folder"):
        reader(folder)


# YAML

YAML_FRAGMENTS = [
    *("beta: ", "batch_size: ", "model: ", "shuffle: ", "training: ", "max_tokens: ", "- ", "? ", ": ", "# ", "|", ">"),
    *(
        "&a ",
        "<<: ",
        "!!int ",
        "!!float ",
        "!!bool ",
        "!!timestamp ",
        "!!binary ",
        "!!set ",
        "!!python/name:os.system ",
    ),
    *("[", "]", "{", "}", ",", "*a", "---", "...", "1e-6", "0x", "190:20:30", ".inf", ".nan", "2001-99-99", "~"),
    *("yes", "auto", DEEP, DIGITS, TABLES, LONG),
    *('""', '"\\e[31m"', '"\\ud800"', "\n", "\n  ", " ", "\u202e", "\x85", "\x00", "%YAML 9\n"),
]


def config_from_text(text):
    for config in (TrainConfig, PrecomputeConfig):
        path = room() / "config.yaml"
        path.write_bytes(written_out(text, depth=500))
        good, value = attempt(lambda config=config, path=path: resolve(config, {}, yaml_path=path), ConfigError, room())
        assert not good or isinstance(value, config)


def options_from(mapping):
    config_from_text(yaml.safe_dump(mapping, allow_unicode=True))


@drawn(200, st.one_of(st.binary(max_size=40), st.lists(st.sampled_from(YAML_FRAGMENTS), max_size=8).map("".join)))
def test_any_text_as_a_config_ends_in_options_or_in_our_own_error(text):
    config_from_text(text)


@drawn(100, st.dictionaries(st.sampled_from([*TrainConfig.__dataclass_fields__, "x"]), json_values(), max_size=4))
def test_any_values_of_options_end_in_options_or_in_our_own_error(mapping):
    options_from(mapping)


def laughs(levels):
    """Ten of ten of ten ...: a few lines that are huge once they are written out."""
    lines = ["training:", f"  a0: &a0 [{', '.join('x' * 10)}]"]
    return "\n".join([*lines, *(f"  a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, levels))])


CONFIGS = {
    "deep": DEEP,
    "a deep value": "training: @tables@",
    "more digits than a float has": "batch_size: " + "9" * 400,
    "more hexadecimal digits": "beta: 0x" + "f" * 5000,
    "a hexadecimal key": "? 0x" + "f" * 5000 + "\n: 1",
    "an empty number": 'beta: !!int ""',
    "an empty decimal": 'beta: !!float ""',
    "no truth value": "shuffle: !!bool x",
    "no date": "beta: !!timestamp x",
    "base sixty": "beta: 1" + ":00" * 300 + ".0",
    "a thousand million laughs": laughs(9) + "\nbeta: *a8",
    "a long text for a number": "beta: " + "a" * 100_000,
    "a long key": "? " + "a" * 100_000 + "\n: 1",
    "merges of merges": "training:\n  a0: &a0 {x: 1}\n"
    + "\n".join(f"  a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 10)}]}}" for n in range(1, 9)),
}


@pytest.mark.parametrize("text", CONFIGS.values(), ids=CONFIGS.keys())
def test_hostile_configs_are_taken_or_refused_by_our_own_error(text):
    config_from_text(text)


# Weights

TENSORS = {
    "__metadata__": {"format": "pt"},
    "a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
    "b": {"dtype": "F32", "shape": [1, 1], "data_offsets": [8, 12]},
}


def weights_from_bytes(content):
    folder = room() / "weights"
    folder.mkdir(exist_ok=True)
    (folder / "model.safetensors").write_bytes(content)
    counts = []
    good, value = attempt(lambda: weights_hash(folder, on_bytes=counts.append), ModelError, folder, folder.name)
    if good:
        assert len(value) == 64
        # Tensors that lie on top of each other would make a small file take for ever.
        assert sum(counts) <= len(content)


def weights_from_value(value, depth=900, digits=4299):
    header = as_json(value, depth, digits).encode()
    weights_from_bytes(len(header).to_bytes(8, "little") + header + bytes(12))


@drawn(60, st.one_of(st.binary(max_size=60), byte_edits))
def test_any_bytes_as_weights_are_hashed_or_refused_by_our_own_error(drawn):
    header = json.dumps(TENSORS).encode()
    good = len(header).to_bytes(8, "little") + header + bytes(12)
    weights_from_bytes(drawn if isinstance(drawn, bytes) else with_edits(good, drawn))


@drawn(150, st.one_of(value_edits.map(lambda edits: changed(TENSORS, edits)), json_values()), depths, digit_counts)
def test_any_header_of_weights_is_hashed_or_refused_by_our_own_error(value, depth, digits):
    weights_from_value(value, depth, digits)


def test_the_header_that_is_changed_here_is_a_good_one():
    weights_from_value(TENSORS)
    assert len(weights_hash(room() / "weights")) == 64


HEADERS = {
    "deep": DEEP,
    "an endless tensor": {"a": {"dtype": "F32", "shape": [1], "data_offsets": [float("inf"), 1]}},
    "half a character": {"\ud800": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}},
    "huge": {"a": {"dtype": "F32", "shape": [1], "data_offsets": [10**4000, 10**4000]}},
    "on top of each other": {f"{n}": {"dtype": "F32", "shape": [3], "data_offsets": [0, 12]} for n in range(1000)},
}


@pytest.mark.parametrize("header", HEADERS.values(), ids=HEADERS.keys())
def test_hostile_headers_are_refused_by_our_own_error(header):
    weights_from_value(header, depth=100_000)
