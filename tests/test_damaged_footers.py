"""Flipped bits in the footers of Parquet files that no manifest lists: read as before, or refused; never the process's end."""

import json
import re
from pathlib import Path

import forks
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from test_shards import ROWS

from offline_kto.kto_core.cache.shards import write_shard
from offline_kto.kto_core.parquet_footers import column_chunks

METADATA = {"identity": {"model": "a"}}
JUDGED = [
    {
        **row,
        "place": f"f.jsonl:{number}",
        "desirable_mass": float(row["label"]),
        "undesirable_mass": float(not row["label"]),
        "objectives": {"kind": {"desirable": 1.0, "undesirable": 0.0}},
    }
    for number, row in enumerate(ROWS[:2])
]
FILES = {
    "a shard": (JUDGED, {**METADATA, "key": "k"}),
    "a part": (ROWS[:2], {**METADATA, "part_of": "k"}),
}

# How Thrift begins a list of 2 to 5 counts of repetition levels. With another bit in the first byte they are those of
# definition levels, of which a column has another number.
LEVELS = re.compile(rb"\x29[\x26\x36\x46\x56]")

# Prints the numbers of files that are refused, equal and changed. Other footers are those of other shards.
READ = """
import json, sys
from pathlib import Path
import pyarrow.parquet as pq
from offline_kto.kto_core.cache.shards import read_metadata
from offline_kto.precompute.score_files import ScoredFile, is_whole, read_scores

def content(path):
    ids, rows, slots = ScoredFile(path, None, None).sequences()
    return ids.tolist(), [one.tolist() for one in read_scores(path, rows, slots)], pq.read_table(path).to_pylist()

path, places, masks = Path(sys.argv[1]), json.loads(sys.argv[2]), json.loads(sys.argv[3])
original, metadata, expected = path.read_bytes(), read_metadata(path), content(path)
found = {"refused": 0, "equal": 0, "changed": 0}
for at in places or range(len(original) - 8 - int.from_bytes(original[-8:-4], "little"), len(original)):
    for mask in masks:
        damaged = bytearray(original)
        damaged[at] ^= mask
        path.write_bytes(damaged)
        print(at, mask, file=sys.stderr, flush=True)  # the last one is that of a process that ended
        if read_metadata(path) != metadata or not is_whole(path, vocabulary=100):
            found["refused"] += 1
        else:
            found["equal" if content(path) == expected else "changed"] += 1
print(json.dumps(found))
"""


def footer(path: Path) -> range:
    content = path.read_bytes()
    return range(len(content) - 8 - int.from_bytes(content[-8:-4], "little"), len(content))


def read_damaged(path: Path, places: list[int], masks: list[int]) -> dict[str, int]:
    """Return how many damaged files were refused, equal and changed."""
    done = forks.run(READ, path, json.dumps(places), json.dumps(masks), timeout=500)
    assert done.returncode == 0, done.stderr[-1000:]
    found: dict[str, int] = json.loads(done.stdout)
    return found


@pytest.fixture
def path(kind: str, tmp_path: Path) -> Path:
    rows, metadata = FILES[kind]
    write_shard(tmp_path / "00000.parquet", rows, metadata)
    return tmp_path / "00000.parquet"


@pytest.mark.parametrize("kind", FILES)
def test_a_wrong_number_of_levels_does_not_end_the_process(path: Path) -> None:
    """Flip what ends the process where pyarrow itself reads the metadata of the column."""
    places = [found.start() for found in LEVELS.finditer(path.read_bytes(), footer(path).start)]
    found = read_damaged(path, places, [16])
    assert found["changed"] == 0
    assert found["refused"] >= 4


@pytest.mark.slow
@pytest.mark.parametrize("kind", FILES)
@pytest.mark.parametrize(("first", "mask"), enumerate([1, 16, 128]))
def test_a_flipped_bit_in_a_footer_changes_nothing_or_is_refused(path: Path, first: int, mask: int) -> None:
    """In every third byte, from another one for each bit."""
    places = [*footer(path)][first::3]
    found = read_damaged(path, places, [mask])
    assert found["changed"] == 0
    assert found["refused"] > len(places) // 3
    assert sum(found.values()) == len(places)


def test_a_renamed_optional_column_is_refused(tmp_path: Path) -> None:
    """In the one of its two places from which Parquet takes names."""
    path = tmp_path / "00000.parquet"
    write_shard(path, *FILES["a shard"])
    content = path.read_bytes()
    places = [at for at in footer(path) if content[at:].startswith((b"place", b"kind"))]
    found = read_damaged(path, places, [1])
    assert found["changed"] == 0
    assert found["refused"] >= 2


@pytest.mark.parametrize("rows", [0, 3])
def test_a_file_without_columns_has_no_metadata_of_columns(tmp_path: Path, rows: int) -> None:
    pq.write_table(pa.table({"a": range(rows)}).select([]), tmp_path / "a.parquet")
    with pq.ParquetFile(tmp_path / "a.parquet") as file:
        assert [*column_chunks(file, (tmp_path / "a.parquet").stat().st_size)] in ([], [[]])
