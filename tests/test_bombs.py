"""Small files that unpack to more than there is memory: one message of ours each, in a process of little memory."""

import gzip
import json
from pathlib import Path
from typing import Any

import forks
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from offline_kto.kto_core.cache.manifest import checksum, read_manifest
from offline_kto.kto_core.cache.row_schema import SCHEMA
from offline_kto.kto_core.cache.shards import check_packing, open_shard
from offline_kto.kto_core.cache.verification import verify_cache
from offline_kto.kto_core.errors import CacheError
from offline_kto.kto_core.hashing import file_hash
from offline_kto.precompute.inspect_cache import head
from offline_kto.precompute.records.sources import read_records

# Address space of the child, above what its imports take.
ROOM = 2 * 2**30

READ = f"""
import resource, sys
import pyarrow.parquet, datasets
from offline_kto.kto_core.errors import KTOError
from offline_kto.kto_core.feedback.columns import COLUMNS
from offline_kto.precompute.records.sources import describe_source, read_records
taken = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (taken + {ROOM}, taken + {ROOM}))
rows = 0
try:
    describe_source(sys.argv[1])
    for where, record in read_records(sys.argv[1], columns=COLUMNS):
        rows += 1
    print(rows, "rows")
except KTOError as error:
    print(error)
"""


def told(path: Path) -> str:
    """Return what reading a file in little memory prints."""
    done = forks.run(READ, path, timeout=100)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.strip()


def dictionary(count: int, text: str) -> pa.DictionaryArray:
    return pa.DictionaryArray.from_arrays(pa.array(np.zeros(count, dtype=np.int32)), pa.array([text]))


def repeated(count: int, rows: int = 1) -> pa.Array:
    """Lists of so many zeros in all, in equally many rows of which the first holds them."""
    ends = np.full(rows + 1, count, dtype=np.int64)
    ends[0] = 0
    return pa.LargeListArray.from_arrays(pa.array(ends), pa.array(np.zeros(count, dtype=np.int8)))


def bomb_dictionary(path: Path) -> None:
    """A text of 2 MB in each of 10,000 rows."""
    pq.write_table(pa.table({"prompt": dictionary(10_000, "x" * 2**21), "label": [True] * 10_000}), path)


def bomb_dictionary_in_messages(path: Path) -> None:
    texts = dictionary(10_000, "x" * 2**21)
    messages = pa.StructArray.from_arrays([dictionary(10_000, "user"), texts], ["role", "content"])
    lists = pa.ListArray.from_arrays(pa.array([0, 10_000], pa.int32()), messages)
    pq.write_table(pa.table({"messages": lists, "label": [True]}), path)


def bomb_list(path: Path) -> None:
    """140 million values in one row."""
    pq.write_table(pa.table({"prompt": repeated(140_000_000), "label": [True]}), path, compression="zstd")


def bomb_long_text(path: Path) -> None:
    pq.write_table(pa.table({"prompt": pa.array(["x" * 2**27], pa.large_string())}), path, compression="zstd")


def packed(start: bytes, piece: bytes, times: int) -> bytes:
    """`start`, and then some 16 MiB of the same piece so many times."""
    return gzip.compress(start, 1) + gzip.compress(piece * (2**24 // len(piece)), 9) * times


def bomb_spaces(path: Path) -> None:
    path.write_bytes(packed(b"", b" ", 200))


def bomb_blank_lines(path: Path) -> None:
    path.write_bytes(packed(b"", b"\n", 20))


def bomb_array(path: Path) -> None:
    path.write_bytes(packed(b"[", b"0,", 200))


def bomb_nested(path: Path) -> None:
    path.write_text('{"a":' + "[" * 10**6)


def bomb_string(path: Path) -> None:
    path.write_bytes(packed(b'{"prompt": "', b"x", 200))


def bomb_rows(path: Path) -> None:
    """Rows that are well formed, the same again and again."""
    line = json.dumps({"prompt": "x" * 10**6, "completion": "y", "label": True}).encode() + b"\n"
    path.write_bytes(packed(b"", line, 20))


def bomb_cell(path: Path) -> None:
    path.write_bytes(packed(b'prompt,completion,label\n"', b"x" * 1000 + b"\n", 200))


def bomb_cells(path: Path) -> None:
    path.write_bytes(packed(b"prompt,completion,label\n", b'"' + b"x" * 1000 + b'\n",', 200))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "make", "words"),
    [
        ("a.parquet", bomb_dictionary, "unpacks to more than 500 times its size"),
        ("a.parquet", bomb_dictionary_in_messages, "unpacks to more than 500 times its size"),
        ("a.parquet", bomb_list, "unpacks to 140,000,000 values"),
        ("a.parquet", bomb_long_text, "unpacks to 1 values and"),
        ("a.json.gz", bomb_spaces, "more than 64 MiB of white space"),
        ("a.jsonl.gz", bomb_spaces, "a line of more than 64 MiB"),
        ("a.jsonl.gz", bomb_blank_lines, "more than 1,000,000 blank lines"),
        ("a.csv.gz", bomb_blank_lines, "more than 1,000,000 blank lines"),
        ("a.json.gz", bomb_array, "a record must be a JSON object"),
        ("a.jsonl.gz", bomb_array, "a record must be a JSON object"),
        ("a.json", bomb_nested, "not readable as JSON"),
        ("a.jsonl", bomb_nested, "not readable as JSON"),
        ("a.json.gz", bomb_string, "a record of more than 64 MiB"),
        ("a.jsonl.gz", bomb_string, "a line of more than 64 MiB"),
        ("a.jsonl.gz", bomb_rows, "unpacks to more than 500 times its size"),
        ("a.csv.gz", bomb_cell, "MiB"),
        ("a.csv.gz", bomb_cells, "a row of more than 64 MiB"),
    ],
    ids=lambda value: value.__name__.removeprefix("bomb_") if callable(value) else None,
)
def test_a_packed_file_is_one_message(tmp_path: Path, name: str, make: Any, words: str) -> None:
    make(tmp_path / name)
    message = told(tmp_path / name)
    assert words in message
    assert message.startswith(f"{name}:")
    assert "Traceback" not in message
    (tmp_path / "set").mkdir()
    (tmp_path / name).rename(tmp_path / "set" / name)
    if make is bomb_cells:  # one of them in a folder is enough
        assert words in told(tmp_path / "set")


@pytest.mark.slow
def test_large_rows_that_are_honest_are_read(tmp_path: Path) -> None:
    """Ten megabytes of text: some two million tokens."""
    rng = np.random.default_rng(0)
    texts = ["".join(map(chr, rng.integers(97, 123, 10 * 2**20).tolist())) for _ in range(2)]
    rows = [{"prompt": text, "completion": f"c{i}", "label": True} for i, text in enumerate(texts)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "a.json").write_text(json.dumps(rows))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet", compression="zstd")
    (tmp_path / "a.json.gz").write_bytes(gzip.compress((tmp_path / "a.json").read_bytes(), 1))
    for path in tmp_path.iterdir():
        assert [row for _, row in read_records(str(path))] == rows


def test_a_long_beginning_that_all_rows_share_is_honest(tmp_path: Path) -> None:
    rows = [
        {"prompt": "You are. " * 10_000, "completion": str(np.random.default_rng(i).bytes(200)), "label": True}
        for i in range(500)
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet", compression="zstd")
    assert [row for _, row in read_records(str(tmp_path / "a.parquet"))] == rows


def test_columns_that_nobody_asked_for_are_not_read(tmp_path: Path) -> None:
    rows = [{"prompt": "p", "completion": "c", "label": True}]
    table = pa.Table.from_pylist(rows).append_column("embedding", repeated(1_000_000))
    pq.write_table(table, tmp_path / "a.parquet", compression="zstd")
    found = [row for _, row in read_records(str(tmp_path / "a.parquet"), columns={*rows[0]})]
    assert found == [{**rows[0], "embedding": "(not read)"}]


def rewritten(cache: Path, out: Path, change: Any) -> Path:
    """A copy of a cache with other columns in its shard, and a manifest that vouches for it."""
    (out / "train").mkdir(parents=True)
    (source,) = (cache / "train").iterdir()
    table = change(pq.read_table(source))
    pq.write_table(table, out / "train" / source.name, compression="zstd", row_group_size=64)
    content = json.loads((cache / "manifest.json").read_text())
    path = out / "train" / source.name
    content["shards"][0] |= {"bytes": path.stat().st_size, "sha256": file_hash(path)}
    content["checksum"] = checksum(content)
    (out / "manifest.json").write_text(json.dumps(content))
    return out


def zeros_in(name: str) -> Any:
    """Twenty million ids in the last row."""

    def change(table: pa.Table) -> pa.Table:
        ends = np.zeros(table.num_rows + 1, dtype=np.int32)
        ends[-1] = 20_000_000
        kind = SCHEMA.field(name).type
        values = pa.array(np.zeros(ends[-1], dtype=np.int32)).cast(kind.value_type)
        return table.set_column(
            SCHEMA.get_field_index(name), SCHEMA.field(name), pa.ListArray.from_arrays(ends, values)
        )

    return change


def long_ids(table: pa.Table) -> pa.Table:
    ids = dictionary(table.num_rows, "x" * 2**26)
    return table.set_column(0, "row_id", ids).replace_schema_metadata(table.schema.metadata)


@pytest.mark.parametrize("change", [zeros_in("prompt_ids"), zeros_in("ref_token_logps"), long_ids])
def test_a_packed_shard_is_refused_before_it_is_unpacked(
    cache: Path, tmp_path: Path, change: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    refs = rewritten(cache, tmp_path / "refs", change)
    assert next((refs / "train").iterdir()).stat().st_size < 2**20
    unpacked = []
    monkeypatch.setattr(pq.ParquetFile, "read_row_groups", lambda *a, **k: unpacked.append(a))
    for read in (lambda: verify_cache(refs, read_manifest(refs)), lambda: list(head(refs, rows=1, model=None))):
        with pytest.raises(CacheError, match=r"00000\.parquet: .*(unpacks to|should be)"):
            read()
    assert unpacked == []


def test_shards_with_long_rows_that_are_alike_are_no_bombs(tmp_path: Path) -> None:
    """Sixty-four rows of one prompt of 60,000 tokens, each scored on its own."""
    rng = np.random.default_rng(0)
    prompt = rng.integers(0, 50_000, 60_000).astype(np.int32)
    row = dict.fromkeys(SCHEMA.names, None) | {
        "row_id": "a" * 64,
        "prompt_id": "b" * 64,
        "source": 0,
        "prompt_ids": prompt,
        "completion_ids": [1],
        "label": True,
        "ref_logps": -1.0,
        "ref_token_logps": [-1.0],
        "kl_completion_ids": [[1]],
        "ref_kl_logps": [-1.0],
        "ref_kl_token_logps": [[-1.0]],
    }
    path = tmp_path / "a.parquet"
    pq.write_table(pa.Table.from_pylist([row] * 64, schema=SCHEMA), path, compression="zstd")
    check_packing(path, open_shard(path))


def test_a_manifest_of_gigabytes_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "manifest.json").open("wb") as file:
        file.truncate(2**33)  # takes no room on the disk
    with pytest.raises(CacheError, match=r"manifest.json: cannot be read \(it has 8,589,934,592 bytes"):
        read_manifest(tmp_path)
