import os

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from offline_kto.kto_core.cache.row_rules import check_table
from offline_kto.kto_core.cache.row_schema import SCHEMA
from offline_kto.kto_core.cache.shards import open_shard, read_metadata, shard_name, write_shard
from offline_kto.kto_core.cache.table_rows import Rows
from offline_kto.kto_core.errors import CacheError


def token_values(random, count):
    return (-random.exponential(3.0, count)).astype(np.float32)


def make_row(number, *, partners=2):
    """A valid row with lists of mixed lengths."""
    random = np.random.default_rng(number)
    tokens = token_values(random, 1 + number % 5)
    kl_tokens = [token_values(random, 1 + (number + k) % 4) for k in range(partners)]
    return {
        "row_id": f"row{number}",
        "prompt_id": f"prompt{number // 2}",
        "pair_id": f"pair{number // 2}" if number % 3 else None,
        "source": number,
        "prompt_ids": random.integers(0, 90, 1 + number % 7).astype(np.int32),
        "completion_ids": random.integers(0, 90, len(tokens)).astype(np.int32),
        "label": number % 2 == 0,
        "ref_logps": float(tokens.sum(dtype=np.float64)),
        "ref_token_logps": tokens,
        "kl_completion_ids": [random.integers(0, 90, len(one)).astype(np.int32) for one in kl_tokens],
        "ref_kl_logps": [float(one.sum(dtype=np.float64)) for one in kl_tokens],
        "ref_kl_token_logps": kl_tokens,
    }


ROWS = [make_row(i) for i in range(150)]


def as_lists(value):
    if isinstance(value, np.ndarray | list):
        return [as_lists(one) for one in value]
    return value.item() if isinstance(value, np.generic) else value


def as_plain(rows):
    return [{name: as_lists(row[name]) for name in SCHEMA.names} for row in rows]


def files_in(folder):
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


def test_shard_names_sort_in_row_order():
    assert shard_name(0) == "train/00000.parquet"
    assert sorted(map(shard_name, (10, 9, 100))) == [shard_name(i) for i in (9, 10, 100)]


@pytest.mark.parametrize("partners", [1, 3])
def test_rows_come_back_as_they_were_written(tmp_path, partners):
    rows = [make_row(i, partners=partners) for i in range(150)]
    write_shard(tmp_path / "00000.parquet", rows, {"first": 0})
    file = open_shard(tmp_path / "00000.parquet")
    back = Rows(file.read())
    assert as_plain(back) == as_plain(rows)
    assert back[0]["prompt_ids"].dtype == back[0]["kl_completion_ids"][0].dtype == np.int32
    assert back[0]["ref_token_logps"].dtype == back[0]["ref_kl_token_logps"][0].dtype == np.float32
    assert files_in(tmp_path) == ["00000.parquet"]


def test_row_groups_decode_by_themselves(tmp_path):
    """Training reads them in random order."""
    write_shard(tmp_path / "00000.parquet", ROWS, {})
    file = open_shard(tmp_path / "00000.parquet")
    assert file.num_row_groups > 1
    groups = [row for g in range(file.num_row_groups) for row in Rows(file.read_row_group(g))]
    assert as_plain(groups) == as_plain(ROWS)


def test_a_slice_of_a_table_decodes_to_its_own_rows(tmp_path):
    write_shard(tmp_path / "00000.parquet", ROWS, {})
    table = open_shard(tmp_path / "00000.parquet").read()
    assert as_plain(Rows(table.slice(20, 5))) == as_plain(ROWS[20:25])


def test_metadata_come_back(tmp_path):
    metadata = {"identity": {"dtype": "float32", "adapter": None}, "rows": [1, 2], "name": "\u00e9"}
    write_shard(tmp_path / "00000.parquet", ROWS[:2], metadata)
    assert read_metadata(tmp_path / "00000.parquet") == metadata


def test_files_that_are_no_shards_have_no_metadata(tmp_path):
    write_shard(tmp_path / "good.parquet", ROWS, {"rows": 1})
    data = (tmp_path / "good.parquet").read_bytes()
    (tmp_path / "cut.parquet").write_bytes(data[: len(data) // 2])
    (tmp_path / "empty.parquet").write_bytes(b"")
    pq.write_table(pa.table({"a": [1]}), tmp_path / "foreign.parquet")
    for name in ("cut", "empty", "foreign", "absent"):
        assert read_metadata(tmp_path / f"{name}.parquet") is None


def changed(**fields):
    """Row 7 of the shard, with other values in some columns."""
    return lambda row: {**row, **fields}


TOKENS, KL_TOKENS = ROWS[7]["ref_token_logps"], ROWS[7]["ref_kl_token_logps"]


def with_token(value):
    tokens = TOKENS.copy()
    tokens[1] = value
    return changed(ref_token_logps=tokens, ref_logps=float(tokens.sum(dtype=np.float64)))


def with_kl_token(value):
    tokens = [KL_TOKENS[0].copy(), KL_TOKENS[1]]
    tokens[0][0] = value
    return changed(ref_kl_token_logps=tokens, ref_kl_logps=[float(t.sum(dtype=np.float64)) for t in tokens])


EMPTY = np.array([], dtype=np.int32)
LONE = [np.array([1], dtype=np.int32)]

BROKEN = {
    "no label": (changed(label=None), "'label' has 1 missing value"),
    "no score": (changed(ref_logps=None), "'ref_logps' has 1 missing value"),
    "no mismatched scores": (changed(ref_kl_token_logps=None), "'ref_kl_token_logps' has 1 missing value"),
    "no prompt id": (changed(prompt_id=None), "'prompt_id' has 1 missing value"),
    "a prompt without tokens": (changed(prompt_ids=EMPTY), "without prompt or completion tokens"),
    "a completion without tokens": (changed(completion_ids=EMPTY), "without prompt or completion tokens"),
    "a score too few": (changed(ref_token_logps=TOKENS[:-1]), "ref_token_logps does not have one score"),
    "a score too many": (changed(ref_token_logps=[*TOKENS, -1.0]), "ref_token_logps does not have one score"),
    "a mismatched list too few": (changed(ref_kl_token_logps=KL_TOKENS[:1]), "ref_kl_token_logps does not have"),
    "a mismatched sum too few": (changed(ref_kl_logps=ROWS[7]["ref_kl_logps"][:1]), "ref_kl_logps does not have"),
    "a mismatched completion too few": (changed(kl_completion_ids=ROWS[7]["kl_completion_ids"][:1]), "does not have"),
    "a mismatched score too few": (
        changed(ref_kl_token_logps=[KL_TOKENS[0], KL_TOKENS[1][:-1]]),
        r"ref_kl_token_logps \(tokens\) does not have one score",
    ),
    "NaN": (with_token(np.nan), "ref_token_logps contains 1 values that are not finite"),
    "minus infinity": (with_token(-np.inf), "ref_token_logps contains 1 values that are not finite"),
    "a mismatched NaN": (with_kl_token(np.nan), "ref_kl_token_logps contains 1 values that are not finite"),
    "a positive score": (with_token(0.25), r"ref_token_logps contains positive log-probabilities \(up to 0.25\)"),
    "a positive mismatched score": (with_kl_token(0.5), "ref_kl_token_logps contains positive log-probabilities"),
    "a sum of other tokens": (changed(ref_logps=-1.0), "ref_logps of row 7 is -1.0+, but its tokens sum to"),
    "a sum of 0": (changed(ref_logps=0.0), "ref_logps of row 7"),
    "a sum off by a thousandth": (changed(ref_logps=ROWS[7]["ref_logps"] - 1e-3), "ref_logps of row 7"),
    "a sum that is NaN": (changed(ref_logps=float("nan")), "ref_logps of row 7"),
    "a mismatched sum of other tokens": (changed(ref_kl_logps=[-1.0, -2.0]), "ref_kl_logps of row"),
    "a negative token id": (
        changed(completion_ids=np.array([3, -1, 2], dtype=np.int32)),
        "completion_ids contains token ids from -1",
    ),
    "a negative prompt id": (
        changed(prompt_ids=np.array([-5], dtype=np.int32)),
        "prompt_ids contains token ids from -5",
    ),
    "a missing token id": (changed(prompt_ids=[1, None, 3]), "prompt_ids"),
    "a missing token score": (changed(ref_token_logps=[-1.0, None, -1.0], ref_logps=-2.0), "ref_token_logps"),
    "a missing mismatched completion": (changed(kl_completion_ids=[None, [1, 2]]), "kl_completion_ids|ref_kl"),
}


def broken_rows(change):
    rows = [make_row(i) for i in range(12)]
    return [*rows[:7], change(rows[7]), *rows[8:]]


def test_the_row_that_is_broken_has_what_the_changes_need():
    assert len(ROWS[7]["completion_ids"]) == 3
    assert all(len(one) >= 1 for one in KL_TOKENS)


@pytest.mark.parametrize(("change", "words"), BROKEN.values(), ids=BROKEN.keys())
def test_a_broken_rule_is_named(change, words):
    plain = [{name: as_lists(value) for name, value in row.items()} for row in broken_rows(change)]
    table = pa.Table.from_pylist(plain, schema=SCHEMA)
    with pytest.raises(CacheError, match=rf"^cache/00003.parquet: .*({words})") as caught:
        check_table(table, "cache/00003.parquet")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("column", ["prompt_ids", "completion_ids", "kl_completion_ids"])
def test_token_ids_must_be_in_the_vocabulary(column):
    table = pa.Table.from_pylist(as_plain(ROWS), schema=SCHEMA)
    largest = max(int(np.max(np.concatenate(row[column]) if column[0] == "k" else row[column])) for row in ROWS)
    check_table(table, "x", vocabulary=90)
    with pytest.raises(CacheError, match=rf"^x: .*_ids contains token ids .*vocabulary \({largest} tokens\)"):
        check_table(table, "x", vocabulary=largest)


def test_valid_tables_pass_whole_sliced_and_empty():
    table = pa.Table.from_pylist(as_plain(ROWS), schema=SCHEMA)
    for part in (table, table.slice(10, 20), table.slice(0, 0), pa.concat_tables([table.slice(0, 9), table.slice(9)])):
        check_table(part, "x")


def test_an_error_in_a_slice_is_found():
    rows = [make_row(i) for i in range(30)]
    rows[20]["ref_logps"] = 0.0
    table = pa.Table.from_pylist(as_plain(rows), schema=SCHEMA)
    check_table(table.slice(0, 20), "x")
    with pytest.raises(CacheError, match="ref_logps of row 5"):
        check_table(table.slice(15, 10), "x")


@pytest.mark.parametrize("name", ["no label", "NaN", "a sum of other tokens", "a score too few"])
def test_rows_that_break_a_rule_never_get_the_final_name(tmp_path, name):
    change, words = BROKEN[name]
    with pytest.raises(CacheError, match=words):
        write_shard(tmp_path / "00000.parquet", broken_rows(change), {})
    assert files_in(tmp_path) == []


def full_disk(*args, **kwargs):
    raise OSError(28, "No space left on device")


def half_written(table, path, **kwargs):
    path.write_bytes(b"PAR1 and then")
    full_disk()


def damaged_on_the_way(table, path, **kwargs):
    ORIGINAL_WRITE(table, path, **kwargs)
    data = bytearray(path.read_bytes())
    data[74] ^= 1  # in a row_id: another letter, which only the page's checksum betrays
    path.write_bytes(data)


ORIGINAL_WRITE = pq.write_table
FAILURES = {
    "write_table": (pq, "write_table", full_disk),
    "half of a file": (pq, "write_table", half_written),
    "a byte damaged on the way": (pq, "write_table", damaged_on_the_way),
    "fsync": (os, "fsync", full_disk),
    "replace": (os, "replace", full_disk),
}


@pytest.mark.parametrize("existing", [False, True], ids=["new", "over a good shard"])
@pytest.mark.parametrize(("module", "function", "failure"), FAILURES.values(), ids=FAILURES.keys())
def test_a_failed_write_leaves_nothing_behind(tmp_path, monkeypatch, module, function, failure, existing):
    path = tmp_path / "00000.parquet"
    if existing:
        write_shard(path, ROWS[:5], {"good": True})
    before = path.read_bytes() if existing else None
    monkeypatch.setattr(module, function, failure)
    with pytest.raises(CacheError, match=r"00000\.parquet: cannot be written: .*run again to continue"):
        write_shard(path, ROWS, {})
    assert files_in(tmp_path) == (["00000.parquet"] if existing else [])
    assert (path.read_bytes() if existing else None) == before


def test_an_interrupted_write_leaves_nothing_behind(tmp_path, monkeypatch):
    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_shard(tmp_path / "00000.parquet", ROWS, {})
    assert files_in(tmp_path) == []


def test_a_folder_that_is_missing_is_an_error_of_the_user(tmp_path):
    with pytest.raises(CacheError, match="cannot be written"):
        write_shard(tmp_path / "absent" / "00000.parquet", ROWS[:2], {})


@pytest.mark.parametrize("damage", [lambda data: b"", lambda data: data[:-20], lambda data: b"PK" + data[2:200]])
def test_a_file_that_is_not_parquet_is_refused(tmp_path, damage):
    path = tmp_path / "00000.parquet"
    write_shard(path, ROWS[:3], {})
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(CacheError, match=r"00000\.parquet: not a readable Parquet file .*Run kto-precompute again"):
        open_shard(path)


@pytest.mark.parametrize("column", SCHEMA.names)
def test_a_shard_without_one_of_the_columns_is_refused(tmp_path, column):
    table = pa.Table.from_pylist(as_plain(ROWS[:3]), schema=SCHEMA)
    pq.write_table(table.drop_columns([column]), tmp_path / "x.parquet")
    with pytest.raises(CacheError, match=rf"x\.parquet: column '{column}' should be .*, found none"):
        open_shard(tmp_path / "x.parquet")


def test_a_column_of_another_type_is_refused(tmp_path):
    table = pa.Table.from_pylist(as_plain(ROWS[:3]), schema=SCHEMA)
    table = table.set_column(
        table.schema.get_field_index("ref_logps"), "ref_logps", pa.array([1.0, 2.0, 3.0], pa.float32())
    )
    pq.write_table(table, tmp_path / "x.parquet")
    with pytest.raises(CacheError, match="'ref_logps' should be double, found float"):
        open_shard(tmp_path / "x.parquet")


def test_the_schema_is_that_of_format_1():
    assert {field.name: str(field.type).replace("element: ", "").replace("item: ", "") for field in SCHEMA} == {
        "row_id": "string",
        "prompt_id": "string",
        "pair_id": "string",
        "source": "int64",
        "prompt_ids": "list<int32>",
        "completion_ids": "list<int32>",
        "label": "bool",
        "ref_logps": "double",
        "ref_token_logps": "list<float>",
        "kl_completion_ids": "list<list<int32>>",
        "ref_kl_logps": "list<double>",
        "ref_kl_token_logps": "list<list<float>>",
    }
    assert [field.name for field in SCHEMA if field.nullable] == ["pair_id"]
