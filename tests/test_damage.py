"""A cache that is not what was written: refused before any training, by file and reason, by every command that reads it."""

import errno
import json
import os
import pickle
import random
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from feedback_files import write_feedback
from models import save_tiny
from test_crashes import assert_same_cache

import offline_kto.train.data.cache_rows
from offline_kto.kto_core.cache.manifest import checksum, read_manifest
from offline_kto.kto_core.cache.verification import verify_cache
from offline_kto.kto_core.errors import CacheError
from offline_kto.kto_core.hashing import file_hash
from offline_kto.precompute.cli import cache as cache_command
from offline_kto.precompute.config import PrecomputeConfig
from offline_kto.precompute.run import precompute
from offline_kto.train.cli import train as train_command
from offline_kto.train.data.cache_rows import CacheRows


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, base: Path) -> Path:
    """Twenty rows in five shards. Do not write to it."""
    folder = tmp_path_factory.mktemp("whole")
    data = write_feedback(folder / "f.jsonl", 20)
    precompute(PrecomputeConfig(model=str(base), data=str(data), out=folder / "refs", rows_per_shard=4))
    return folder / "refs"


@pytest.fixture
def refs(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "refs"))


SHARD = "train/00001.parquet"


def change_manifest(refs: Path, change: Callable[[dict[str, Any]], object], *, signed: bool = True) -> None:
    """Edit the manifest; with `signed`, as somebody who knows how it vouches for itself."""
    path = refs / "manifest.json"
    content = json.loads(path.read_text())
    change(content)
    if signed:
        content["checksum"] = checksum(content)
    path.write_text(json.dumps(content, indent=2))


def entry(content: dict[str, Any], name: str = SHARD) -> dict[str, Any]:
    found: dict[str, Any] = next(shard for shard in content["shards"] if shard["file"] == name)
    return found


def declare(refs: Path, name: str = SHARD) -> None:
    """Let the manifest vouch for the shard as it is now."""
    path = refs / name
    change_manifest(
        refs, lambda content: entry(content, name).update(bytes=path.stat().st_size, sha256=file_hash(path))
    )


def change_rows(refs: Path, change: Callable[[list[dict[str, Any]]], object], name: str = SHARD) -> None:
    """Other values in a shard of valid Parquet, which the manifest vouches for."""
    table = pq.read_table(refs / name)
    rows = table.to_pylist()
    change(rows)
    pq.write_table(pa.Table.from_pylist(rows, schema=table.schema), refs / name)
    declare(refs, name)


def set_score(rows: list[dict[str, Any]], value: float, column: str = "ref_token_logps") -> None:
    scores = rows[2][column][0] if column == "ref_kl_token_logps" else rows[2][column]
    scores[0] = value
    rows[2]["ref_logps"] = float(sum(rows[2]["ref_token_logps"]))
    rows[2]["ref_kl_logps"] = [float(sum(one)) for one in rows[2]["ref_kl_token_logps"]]


def swap_labels(refs: Path) -> None:
    """Let the labels of two rows change places: the number of desirable rows stays as it is."""
    shards = [f"train/0000{number}.parquet" for number in range(5)]
    labels = {name: pq.read_table(refs / name, columns=["label"]).column("label")[0].as_py() for name in shards}
    for wanted in (True, False):
        name = next(name for name, label in labels.items() if label is wanted)
        change_rows(refs, lambda rows, wanted=wanted: rows[0].update(label=not wanted), name)  # type: ignore[misc]


def flip(path: Path, at: int, bit: int = 1) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= bit
    path.write_bytes(content)


def swap(refs: Path) -> None:
    one, other = refs / SHARD, refs / "train/00002.parquet"
    content = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(content)


def other_schema(refs: Path) -> None:
    table = pq.read_table(refs / SHARD)
    place = table.schema.get_field_index("ref_logps")
    pq.write_table(table.set_column(place, "ref_logps", table.column("ref_logps").cast(pa.float32())), refs / SHARD)
    declare(refs)


def pickled(refs: Path) -> None:
    (refs / SHARD).write_bytes(pickle.dumps(Trap(refs.parent / "executed")))
    declare(refs)


class Trap:
    """Unpickling it leaves a file behind."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def outside(refs: Path) -> None:
    shutil.move(refs / SHARD, refs.parent / "00001.parquet")
    change_manifest(refs, lambda content: entry(content).update(file="../00001.parquet"))


def linked(refs: Path) -> None:
    shutil.move(refs / SHARD, refs.parent / "elsewhere.parquet")
    (refs / SHARD).symlink_to(refs.parent / "elsewhere.parquet")


def of_another_reference(refs: Path) -> None:
    """A whole shard of the same rows, which a model with other weights scored."""
    model = save_tiny(refs.parent / "other", seed=5)
    data = str(write_feedback(refs.parent / "f.jsonl", 20))
    precompute(PrecomputeConfig(model=str(model), data=data, out=refs.parent / "theirs", rows_per_shard=4))
    shutil.copy(refs.parent / "theirs" / SHARD, refs / SHARD)
    declare(refs)


def rows_twice(refs: Path) -> None:
    """A copy of a shard, which the manifest lists and counts."""
    shutil.copy(refs / SHARD, refs / "train/00005.parquet")
    wanted = sum(pq.read_table(refs / SHARD).column("label").to_pylist())

    def listed(content: dict[str, Any]) -> None:
        content["shards"].append({**entry(content), "file": "train/00005.parquet"})
        content["data"].update(kept=24, desirable=content["data"]["desirable"] + wanted)

    change_manifest(refs, listed)


def a_folder(refs: Path) -> None:
    (refs / SHARD).unlink()
    (refs / SHARD).mkdir()


def a_pipe(refs: Path) -> None:
    (refs / SHARD).unlink()
    os.mkfifo(refs / SHARD)


def linked_folder(refs: Path) -> None:
    shutil.move(refs / "train", refs.parent / "elsewhere")
    (refs / "train").symlink_to(refs.parent / "elsewhere")


# name: (what is done to the folder, the file named, the reason given)
DAMAGES: dict[str, tuple[Callable[[Path], object], str, str]] = {
    "a flipped bit": (lambda refs: flip(refs / SHARD, 2000), SHARD, "sha256 differs"),
    "a shard that was cut off": (
        lambda refs: (refs / SHARD).write_bytes((refs / SHARD).read_bytes()[:-500]),
        SHARD,
        "bytes, the manifest says",
    ),
    "an empty shard": (lambda refs: (refs / SHARD).write_bytes(b""), SHARD, "0 bytes, the manifest says"),
    "a missing shard": (lambda refs: (refs / SHARD).unlink(), SHARD, "missing"),
    "a shard twice": (
        lambda refs: shutil.copy(refs / SHARD, refs / "train/00005.parquet"),
        "train/00005.parquet",
        "not in the manifest",
    ),
    "a shard in place of another": (
        lambda refs: shutil.copy(refs / "train/00002.parquet", refs / SHARD),
        SHARD,
        "(sha256 differs|bytes, the manifest says)",
    ),
    "two shards exchanged": (swap, SHARD, "(sha256 differs|bytes, the manifest says)"),
    "a shard listed twice": (
        lambda refs: change_manifest(refs, lambda content: content["shards"].append(content["shards"][1])),
        "manifest.json",
        "lists a shard twice",
    ),
    "a shard taken from the list": (
        lambda refs: change_manifest(refs, lambda content: content["shards"].pop()),
        "manifest.json",
        "a shard is missing",
    ),
    "an empty manifest": (lambda refs: (refs / "manifest.json").write_bytes(b""), "manifest.json", "cannot be read"),
    "no manifest": (lambda refs: (refs / "manifest.json").unlink(), "", "an unfinished cache"),
    "an edited number": (
        lambda refs: change_manifest(refs, lambda content: content["data"].update(truncated=3), signed=False),
        "manifest.json",
        "was edited or damaged",
    ),
    "a manifest without its checksum": (
        lambda refs: change_manifest(refs, lambda content: content.pop("checksum"), signed=False),
        "manifest.json",
        "was edited or damaged",
    ),
    "an edited length": (
        lambda refs: change_manifest(refs, lambda content: content["tokenization"].update(max_length=64)),
        "manifest.json",
        "does not match its own fingerprint",
    ),
    "two labels swapped": (
        swap_labels,
        "manifest.json",
        r"labels, masses, pairs, .* \(labels_hash differs\). Run the same kto-precompute again",
    ),
    "edited counts": (
        lambda refs: change_manifest(refs, lambda content: content["data"].update(desirable=3)),
        "manifest.json",
        "has 3 desirable rows",
    ),
    "a newer format": (
        lambda refs: change_manifest(refs, lambda content: content.update(format=2)),
        "manifest.json",
        "cache format 2; this version reads format 1",
    ),
    "a path that leaves the folder": (outside, "manifest.json", "is outside the cache folder"),
    "a link that leaves the folder": (linked, SHARD, "is outside the cache folder"),
    "a pickle": (pickled, SHARD, "not a readable Parquet file"),
    "another schema": (other_schema, SHARD, "column 'ref_logps' should be double, found float"),
    "a score that is not a number": (
        lambda refs: change_rows(refs, lambda rows: set_score(rows, float("nan"))),
        SHARD,
        "ref_token_logps contains 1 values that are not finite",
    ),
    "an infinite score": (
        lambda refs: change_rows(refs, lambda rows: set_score(rows, float("-inf"), "ref_kl_token_logps")),
        SHARD,
        "ref_kl_token_logps contains 1 values that are not finite",
    ),
    "a positive score": (
        lambda refs: change_rows(refs, lambda rows: set_score(rows, 0.5)),
        SHARD,
        "positive log-probabilities",
    ),
    "a sum of other scores": (
        lambda refs: change_rows(refs, lambda rows: rows[2].update(ref_logps=-1.0)),
        SHARD,
        "ref_logps of row 2 is -1",
    ),
    "a score too few": (
        lambda refs: change_rows(refs, lambda rows: rows[2]["ref_token_logps"].pop()),
        SHARD,
        "one score for each token",
    ),
    "a mismatched completion too few": (
        lambda refs: change_rows(
            refs, lambda rows: rows[2].update(kl_completion_ids=[], ref_kl_logps=[], ref_kl_token_logps=[])
        ),
        SHARD,
        "without its 1 mismatched completions",
    ),
    "a token outside of the vocabulary": (
        lambda refs: change_rows(refs, lambda rows: rows[2]["prompt_ids"].append(10**6)),
        SHARD,
        "outside the vocabulary",
    ),
    "a negative token": (
        lambda refs: change_rows(refs, lambda rows: rows[2]["completion_ids"].__setitem__(0, -1)),
        SHARD,
        "outside the vocabulary",
    ),
    "a shard of another reference": (of_another_reference, SHARD, r"another reference \(reference.weights_hash"),
    "rows twice": (rows_twice, "train/00005.parquet", r"the same rows as 00001\.parquet"),
    "a folder in place of a shard": (a_folder, SHARD, "not a regular file. Remove it"),
    "a pipe in place of a shard": (a_pipe, SHARD, "not a regular file. Remove it"),
    "a folder of shards that lies elsewhere": (
        linked_folder,
        "train/00000.parquet",
        "is outside the cache folder",
    ),
    "a row too few": (lambda refs: change_rows(refs, lambda rows: rows.pop()), SHARD, "3 rows, the manifest says 4"),
}


@pytest.mark.parametrize("command", ["kto-train", "kto-train --eval-cache", "kto-cache verify"])
@pytest.mark.parametrize(("damage", "file", "reason"), DAMAGES.values(), ids=DAMAGES.keys())
def test_every_command_refuses_by_file_and_reason(
    command: str, damage: Callable[[Path], object], file: str, reason: str, refs: Path, whole: Path, tmp_path: Path
) -> None:
    damage(refs)
    if command == "kto-cache verify":
        done = CliRunner().invoke(cache_command, ["verify", str(refs)])
    else:
        caches = [str(refs)] if command == "kto-train" else [str(whole), "--eval-cache", str(refs)]
        options = ["--out", str(tmp_path / "run"), "--device", "cpu"]
        done = CliRunner().invoke(train_command, ["--cache", *caches, *options])
    assert done.exit_code == 1
    assert isinstance(done.exception, SystemExit)  # no traceback
    lines = [line for line in done.stderr.splitlines() if line.startswith("Error: ")]
    assert len(lines) == 1
    said = lines[0]
    assert str(refs / file) in said
    assert re.search(reason, said), said
    assert not (tmp_path / "executed").exists()
    assert not list((tmp_path / "run").glob("*"))


@pytest.mark.parametrize("every", [10, pytest.param(1, marks=pytest.mark.slow)])
def test_a_flipped_bit_anywhere_is_found(base: Path, tmp_path: Path, every: int) -> None:
    """Each byte of the manifest, and hundreds of bytes of a shard, its footer among them; or every tenth of them."""
    data = write_feedback(tmp_path / "f.jsonl", 4)
    refs = tmp_path / "refs"  # one small shard: each flip is a verification of the whole cache
    precompute(PrecomputeConfig(model=str(base), data=str(data), out=refs))
    rng = random.Random(0)
    shard, manifest = refs / "train/00000.parquet", refs / "manifest.json"
    size, footer = shard.stat().st_size, 400
    places = [(manifest, at) for at in range(manifest.stat().st_size)]
    places += [(shard, at) for at in [*rng.sample(range(size - footer), 200), *range(size - footer, size)]]
    for path, at in places[::every]:
        bit = 1 << rng.randrange(8)
        flip(path, at, bit)
        with pytest.raises(CacheError):
            verify_cache(refs, read_manifest(refs))
        flip(path, at, bit)
    verify_cache(refs, read_manifest(refs))


def test_info_says_that_a_manifest_was_edited(refs: Path) -> None:
    said = CliRunner().invoke(cache_command, ["info", str(refs)]).output
    assert "edited" not in said
    change_manifest(refs, lambda content: content["data"].update(truncated=3), signed=False)
    said = CliRunner().invoke(cache_command, ["info", str(refs)]).output
    assert "truncated: 3" in said
    assert "was edited or damaged" in said


def test_what_was_damaged_is_mended_by_running_again(refs: Path, whole: Path, base: Path) -> None:
    """Only the shard that was damaged is scored; the others vouch for themselves."""
    config = PrecomputeConfig(model=str(base), data=str(whole.parent / "f.jsonl"), out=refs, rows_per_shard=4)
    flip(refs / SHARD, 2000)
    precompute(config)
    assert 0 < read_manifest(refs).run["scored_sequences"] <= 8
    verify_cache(refs, read_manifest(refs))


@pytest.mark.parametrize(("damage", "file", "reason"), DAMAGES.values(), ids=DAMAGES.keys())
def test_running_again_mends_whatever_can_be_mended(
    damage: Callable[[Path], object], file: str, reason: str, refs: Path, whole: Path, base: Path
) -> None:
    """Follow the advice of the refusal: the cache is then accepted, with its old scores."""
    damage(refs)
    config = PrecomputeConfig(model=str(base), data=str(whole.parent / "f.jsonl"), out=refs, rows_per_shard=4)
    if "Remove it" in reason:
        with pytest.raises(CacheError, match=r"00001\.parquet is not a regular file. Remove it"):
            precompute(config)
        (refs / SHARD).rmdir() if (refs / SHARD).is_dir() else (refs / SHARD).unlink()
    if (refs / "train").is_symlink():
        with pytest.raises(CacheError, match=r"train is a file or a link, .* Remove it"):
            precompute(config)
        (refs / "train").unlink()
    if reason.startswith("cache format 2"):  # another version's, and perhaps perfectly good
        with pytest.raises(CacheError, match=r"cache format 2; .*or into this one with --overwrite"):
            precompute(config)
        config = replace(config, overwrite=True)
    precompute(config)
    assert_same_cache(refs, whole)


@pytest.mark.parametrize("damage", [lambda path: flip(path, -5), lambda path: path.write_bytes(b"")])
def test_a_damaged_shard_of_an_unfinished_cache_is_scored_again(
    damage: Callable[[Path], object], refs: Path, whole: Path, base: Path
) -> None:
    (refs / "manifest.json").unlink()
    damage(refs / SHARD)
    precompute(PrecomputeConfig(model=str(base), data=str(whole.parent / "f.jsonl"), out=refs, rows_per_shard=4))
    assert_same_cache(refs, whole)
    assert 0 < read_manifest(refs).run["scored_sequences"] <= 8


def flip_label(rows: list[dict[str, Any]]) -> None:
    rows[1]["label"] = not rows[1]["label"]


def move_row(rows: list[dict[str, Any]]) -> None:
    rows[1]["place"] = "elsewhere.jsonl:7"


@pytest.mark.parametrize(("change", "column"), [(flip_label, "label"), (move_row, "place")])
@pytest.mark.parametrize("is_finished", [True, False])
def test_a_shard_that_claims_to_be_planned_but_has_other_rows_is_scored_again(
    change: Callable[[list[dict[str, Any]]], None],
    column: str,
    is_finished: bool,
    refs: Path,
    whole: Path,
    base: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Its footer has the key of the plan, and its hash is that of the manifest."""
    change_rows(refs, change)
    if is_finished:
        change_manifest(refs, lambda content: content["data"].update(desirable=1))  # does not agree with the shards
    else:
        (refs / "manifest.json").unlink()
    precompute(PrecomputeConfig(model=str(base), data=str(whole.parent / "f.jsonl"), out=refs, rows_per_shard=4))
    assert f"00001.parquet: {column} is not as planned; this shard is scored again" in capsys.readouterr().out
    assert_same_cache(refs, whole)
    assert 0 < read_manifest(refs).run["scored_sequences"] <= 8


@pytest.mark.parametrize("place", ["manifest.json", "train", SHARD])
def test_what_may_not_be_read_is_one_message(place: str, refs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Expect the system's own words, which root never sees."""
    is_file = Path.is_file

    def forbidden(path: Path) -> bool:
        if str(path).startswith(str(refs / place)):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return is_file(path)

    monkeypatch.setattr(Path, "is_file", forbidden)
    with pytest.raises(CacheError, match=rf"{refs / place}.*: cannot be read .*Permission denied.*owner and mode"):
        verify_cache(refs, read_manifest(refs))


@pytest.mark.parametrize("name", ["manifest.json", SHARD])
def test_a_file_in_place_of_the_folder_is_named_as_one(name: str, refs: Path) -> None:
    with pytest.raises(CacheError, match="a file; pass the cache's folder"):
        read_manifest(refs / name)


def test_a_cache_that_is_updated_stays_what_it_was_for_who_reads_it(refs: Path, whole: Path, base: Path) -> None:
    rows = CacheRows(refs)
    data = write_feedback(refs.parent / "other.jsonl", 25, seed=9)
    precompute(PrecomputeConfig(model=str(base), data=str(data), out=refs, rows_per_shard=4))
    before = CacheRows(whole)
    for i in range(len(before)):
        assert rows[i].row_id == before[i].row_id
        assert rows[i].matched.ref_logps == before[i].matched.ref_logps


def test_a_cache_that_is_updated_while_it_is_opened_is_refused(
    refs: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the check of its bytes and the opening of its files."""
    data = write_feedback(refs.parent / "other.jsonl", 25, seed=9)
    verify = offline_kto.train.data.cache_rows.verify_cache

    def then_updated(*arguments: Any, **options: Any) -> Any:
        found = verify(*arguments, **options)
        precompute(PrecomputeConfig(model=str(base), data=str(data), out=refs, rows_per_shard=4))
        return found

    monkeypatch.setattr(offline_kto.train.data.cache_rows, "verify_cache", then_updated)
    with pytest.raises(CacheError, match="was updated while it was read"):
        CacheRows(refs)


def test_the_processes_of_a_launch_share_the_check_of_what_rows_hold(refs: Path) -> None:
    """Each checks every other shard's content; sizes, counts and labels all of them."""
    flip(refs / SHARD, 2000)
    manifest = read_manifest(refs)
    found = verify_cache(refs, manifest, share=(0, 2))
    assert len(found.labels) == 20
    with pytest.raises(CacheError, match=r"00001\.parquet: .*sha256 differs"):
        verify_cache(refs, manifest, share=(1, 2))
