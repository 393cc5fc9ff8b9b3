import hashlib
import json
import os
import re
import shutil

import datasets
import pandas
import pytest
from test_shards import ROWS, as_plain

from offline_kto.kto_core.cache.manifest import (
    MANIFEST,
    checksum,
    differences,
    fingerprint,
    identity_of,
    read_manifest,
    write_manifest,
)
from offline_kto.kto_core.cache.shards import open_shard, shard_name, write_shard
from offline_kto.kto_core.cache.table_rows import Rows
from offline_kto.kto_core.cache.verification import verify_cache
from offline_kto.kto_core.errors import CacheError


def sections(rows):
    return {
        "reference": {
            "id": "org/model",
            "revision": "abc",
            "weights_hash": "w" * 64,
            "config_hash": "c" * 64,
            "adapter": None,
            "adapter_hash": None,
            "quantization": None,
            "dtype": "float32",
            "attention": "sdpa",
        },
        "tokenizer": {"files_hash": "f" * 64, "chat_template_hash": None},
        "tokenization": {"max_length": 1024, "rule": 1},
        "pairing": {"method": "shuffled", "partners": 2, "seed": 0, "block": None},
        "scorer": {"backend": "transformers", "versions": {"torch": "2.9"}},
        "data": {
            "files": [{"name": "feedback.jsonl", "sha256": "d" * 64, "bytes": 10}],
            "read": rows,
            "kept": rows,
            "desirable": sum(row["label"] for row in ROWS[:rows]),
            "undesirable": sum(not row["label"] for row in ROWS[:rows]),
            "rows_hash": "r" * 64,
        },
        "run": {"scored_sequences": 3 * rows, "seconds": 1.5},
    }


def make_cache(folder, *, shards=2, rows_per_shard=20):
    """A whole cache of valid rows; returns the folder."""
    (folder / "train").mkdir(parents=True)
    entries = []
    for number in range(shards):
        path = folder / shard_name(number)
        write_shard(path, ROWS[number * rows_per_shard : (number + 1) * rows_per_shard], {"number": number})
        data = path.read_bytes()
        entries.append(
            {
                "file": shard_name(number),
                "rows": rows_per_shard,
                "bytes": len(data),
                "sha256": hashlib.sha256(data).hexdigest(),
            }
        )
    parts = sections(shards * rows_per_shard)
    write_manifest(folder, parts, entries, fingerprint(identity_of(parts), parts["pairing"], "r" * 64))
    return folder


@pytest.fixture
def cache(tmp_path):
    return make_cache(tmp_path / "refs")


def edit(cache, change):
    """Apply `change` to the manifest's content, in place, as somebody who knows of the checksum."""
    path = cache / MANIFEST
    content = json.loads(path.read_text(encoding="utf-8"))
    change(content)
    if "checksum" in content:
        content["checksum"] = checksum(content)
    path.write_text(json.dumps(content), encoding="utf-8")


def refusal(call, *args):
    with pytest.raises(CacheError) as caught:
        call(*args)
    message = str(caught.value)
    assert "\n" not in message
    assert 20 < len(message) < 400
    return message


def test_a_manifest_comes_back_as_it_was_written(cache):
    manifest = read_manifest(cache)
    for name, content in sections(40).items():
        assert getattr(manifest, name) == content
    assert manifest.rows == 40
    assert manifest.identity == identity_of(sections(40))
    assert [shard["file"] for shard in manifest.shards] == ["train/00000.parquet", "train/00001.parquet"]
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", manifest.created)
    verify_cache(cache, manifest)


def test_a_cache_can_be_moved(cache, tmp_path):
    cache.rename(tmp_path / "elsewhere")
    verify_cache(tmp_path / "elsewhere", read_manifest(tmp_path / "elsewhere"))


def test_a_cache_is_parquet_and_json_and_nothing_else(cache):
    files = sorted(path for path in cache.rglob("*") if path.is_file())
    assert [path.name for path in files] == [MANIFEST, "00000.parquet", "00001.parquet"]
    assert all(path.read_bytes()[:4] == path.read_bytes()[-4:] == b"PAR1" for path in files[1:])
    assert json.loads(files[0].read_bytes())["format"] == 1


def test_pandas_reads_a_cache(cache):
    frame = pandas.read_parquet(cache / "train")
    assert len(frame) == 40
    assert frame["ref_logps"].tolist() == [row["ref_logps"] for row in ROWS[:40]]
    assert [ids.tolist() for ids in frame["completion_ids"]] == [row["completion_ids"].tolist() for row in ROWS[:40]]


def test_datasets_reads_a_cache(cache, tmp_path):
    loaded = datasets.load_dataset(str(cache), cache_dir=str(tmp_path / "datasets"))
    assert list(loaded) == ["train"]
    assert loaded["train"].to_list() == as_plain(ROWS[:40])


def test_a_folder_that_is_missing_names_the_command_that_makes_one(tmp_path):
    message = refusal(read_manifest, tmp_path / "refs")
    assert "no such folder" in message
    assert f"kto-precompute --model MODEL --data FILE --out {tmp_path / 'refs'}" in message


def test_a_folder_with_other_things_is_no_cache(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert "not a reference cache" in refusal(read_manifest, tmp_path)


def test_a_cache_without_its_manifest_is_unfinished(cache):
    (cache / MANIFEST).unlink()
    message = refusal(read_manifest, cache)
    assert "an unfinished cache" in message
    assert "continues where it stopped" in message


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b'{"format": 1',
        b"\xff\xfe{}",
        b"null",
        b"[]",
        b'"text"',
        b"{}",
        b'{"format": "1"}',
        b'{"format": null}',
    ],
)
def test_a_damaged_manifest_is_refused(cache, content):
    (cache / MANIFEST).write_bytes(content)
    assert str(cache / MANIFEST) in refusal(read_manifest, cache)


@pytest.mark.parametrize("size", [1, 40, 400, 900])
def test_a_manifest_that_was_cut_off_is_refused(cache, size):
    path = cache / MANIFEST
    path.write_bytes(path.read_bytes()[:size])
    assert "cannot be read" in refusal(read_manifest, cache)


@pytest.mark.parametrize("number", [0, 2, 99])
def test_another_format_is_refused(cache, number):
    edit(cache, lambda content: content.update(format=number))
    assert f"cache format {number}; this version reads format 1" in refusal(read_manifest, cache)


@pytest.mark.parametrize("key", [*sections(1), "shards", "fingerprint", "created"])
@pytest.mark.parametrize("value", ["absent", None, 3])
def test_every_part_of_the_manifest_is_required(cache, key, value):
    edit(cache, lambda content: content.pop(key) if value == "absent" else content.update({key: value}))
    assert MANIFEST in refusal(read_manifest, cache)


# Everything that can change a number in the cache.
IDENTITY = [
    ("reference", "weights_hash"),
    ("reference", "config_hash"),
    ("reference", "adapter_hash"),
    ("reference", "quantization"),
    ("reference", "dtype"),
    ("reference", "attention"),
    ("tokenizer", "files_hash"),
    ("tokenizer", "chat_template_hash"),
    ("tokenization", "max_length"),
    ("tokenization", "rule"),
    ("scorer", "backend"),
    ("pairing", "method"),
    ("pairing", "partners"),
    ("pairing", "seed"),
    ("pairing", "block"),
    ("data", "rows_hash"),
]
NAMES = [
    ("reference", "id"),
    ("reference", "revision"),
    ("reference", "adapter"),
    ("scorer", "versions"),
    ("data", "files"),
    ("run", "seconds"),
]


@pytest.mark.parametrize(("section", "field"), IDENTITY)
def test_what_decides_a_number_cannot_be_edited(cache, section, field):
    edit(cache, lambda content: content[section].update({field: "other"}))
    assert "does not match its own fingerprint" in refusal(read_manifest, cache)


@pytest.mark.parametrize(("section", "field"), NAMES)
def test_names_paths_and_versions_are_not_in_the_fingerprint(cache, section, field):
    before = read_manifest(cache).fingerprint
    edit(cache, lambda content: content[section].update({field: [{"name": "other"}] if field == "files" else "other"}))
    assert read_manifest(cache).fingerprint == before


def test_the_fingerprint_itself_cannot_be_edited(cache):
    edit(cache, lambda content: content.update(fingerprint="0" * 64))
    assert "does not match its own fingerprint" in refusal(read_manifest, cache)


def test_the_fingerprint_is_that_of_every_cache_written_before():
    parts = sections(40)
    mark = fingerprint(identity_of(parts), parts["pairing"], "r" * 64)
    assert mark == "f40c934a5bbdf70cd2e942c03cb32fb31b6c83be63b7794f8f395985e97e762c"


def test_a_shard_taken_from_the_list_is_missed(cache):
    """The cache would train on a part of its rows, and nobody would know."""
    edit(cache, lambda content: content["shards"].pop())
    assert MANIFEST in refusal(read_manifest, cache)


def test_differences_name_both_sides():
    wanted = sections(1)
    wanted["tokenization"]["max_length"] = 512
    wanted["reference"]["weights_hash"] = "v" * 64
    lines = differences(identity_of(sections(1)), identity_of(wanted))
    assert lines == [
        "reference.weights_hash: wwwwwwwwwwww... in the cache, vvvvvvvvvvvv... now",
        "tokenization.max_length: 1024 in the cache, 512 now",
    ]
    assert differences(identity_of(wanted), identity_of(wanted)) == []


def test_text_that_became_conversations_is_named_with_the_option():
    old, new = sections(1), sections(1)
    new["tokenization"]["chat"] = True
    assert "tokenization.chat" not in identity_of(old)
    assert fingerprint(identity_of(old), {}, "r") != fingerprint(identity_of(new), {}, "r")
    as_it_is, turned = "plain text as it is (--chat never)", "plain text as conversations (--chat auto)"
    for one, other, sides in ((old, new, (as_it_is, turned)), (new, old, (turned, as_it_is))):
        (line,) = differences(identity_of(one), identity_of(other))
        assert line == "tokenization.chat: {} in the cache, {} now".format(*sides)


@pytest.mark.parametrize(
    "entry",
    [
        "train/00000.parquet",
        {"file": "train/00000.parquet"},
        {"file": 3, "rows": 1, "bytes": 1, "sha256": ""},
        {"file": "train/00000.parquet", "rows": "1", "bytes": 1, "sha256": ""},
        {"file": "train/00000.parquet", "rows": 1, "bytes": None, "sha256": ""},
        {"file": "train/00000.parquet", "rows": 1, "bytes": 1},
    ],
)
def test_a_damaged_shard_entry_is_refused(cache, entry):
    edit(cache, lambda content: content["shards"].__setitem__(0, entry))
    assert "a shard entry is damaged" in refusal(read_manifest, cache)


def test_a_cache_without_shards_is_refused(cache):
    edit(cache, lambda content: content.update(shards=[]))
    assert "lists no shards" in refusal(read_manifest, cache)


@pytest.mark.parametrize(
    "file",
    [
        "../secret.parquet",
        "train/../../secret.parquet",
        "/etc/secret.parquet",
        "..\\secret.parquet",
        "train\\..\\..\\secret.parquet",
        "C:\\secret.parquet",
        "..",
    ],
)
def test_a_path_that_leaves_the_folder_is_refused(cache, file):
    (cache.parent / "secret.parquet").write_bytes((cache / "train/00000.parquet").read_bytes())
    edit(cache, lambda content: content["shards"][0].update(file=file))
    assert "outside the cache folder; it is not read" in refusal(read_manifest, cache)


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_link_that_leaves_the_folder_is_refused(cache, kind):
    outside = cache.parent / "outside"
    outside.mkdir()
    shutil.move(cache / "train/00000.parquet", outside / "00000.parquet")
    if kind == "file":
        (cache / "train/00000.parquet").symlink_to(outside / "00000.parquet")
    else:
        (cache / "train/more").symlink_to(outside)
        edit(cache, lambda content: content["shards"][0].update(file="train/more/00000.parquet"))
    assert "outside the cache folder; it is not read" in refusal(verify_cache, cache, read_manifest(cache))


@pytest.mark.parametrize("spelling", ["train/00000.parquet", "./train/00000.parquet", "train//00000.parquet"])
def test_a_shard_listed_twice_is_refused(cache, spelling):
    def repeat(content):
        content["shards"][1] = {**content["shards"][0], "file": spelling}

    edit(cache, repeat)
    assert "lists a shard twice" in refusal(read_manifest, cache)


def damaged(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGES = {
    "missing": (lambda path: path.unlink(), "missing. Run the same kto-precompute again"),
    "a folder": (lambda path: (path.unlink(), path.mkdir()), "not a regular file"),
    "empty": (lambda path: path.write_bytes(b""), r"0 bytes, the manifest says \d+"),
    "truncated": (lambda path: path.write_bytes(path.read_bytes()[:-1]), r"\d+ bytes, the manifest says \d+"),
    "longer": (lambda path: path.write_bytes(path.read_bytes() + b"\0"), r"\d+ bytes, the manifest says \d+"),
    "one bit": (damaged, "its content changed since it was written"),
}


@pytest.mark.parametrize(("damage", "words"), DAMAGES.values(), ids=DAMAGES.keys())
def test_a_damaged_shard_is_named(cache, damage, words):
    path = cache / "train/00001.parquet"
    damage(path)
    assert re.match(rf"{re.escape(str(path))}: .*{words}", refusal(verify_cache, cache, read_manifest(cache)))


def test_shards_that_changed_places_are_refused(cache):
    first, second = (cache / shard_name(i) for i in range(2))
    first.rename(cache / "held")
    second.rename(first)
    os.rename(cache / "held", second)
    refusal(verify_cache, cache, read_manifest(cache))


def test_shards_of_equal_size_that_changed_places_are_refused(tmp_path):
    cache = make_cache(tmp_path / "refs", shards=1)
    other = tmp_path / "other.parquet"
    row = Rows(open_shard(cache / shard_name(0)).read())[0]
    write_shard(cache / shard_name(0), [{**row, "row_id": "row1"}], {})
    write_shard(other, [{**row, "row_id": "row2"}], {})
    data = (cache / shard_name(0)).read_bytes()
    assert len(data) == len(other.read_bytes())
    digest = hashlib.sha256(data).hexdigest()
    edit(cache, lambda content: content["shards"][0].update(rows=1, bytes=len(data), sha256=digest))
    edit(cache, lambda content: content["data"].update(kept=1, desirable=int(row["label"])))
    manifest = read_manifest(cache)
    verify_cache(cache, manifest)
    shutil.copy(other, cache / shard_name(0))
    assert "its content changed since it was written" in refusal(verify_cache, cache, manifest)
