import csv
import decimal
import gzip
import hashlib
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from offline_kto.kto_core.errors import FeedbackError, KTOError
from offline_kto.kto_core.feedback.columns import FeedbackFields
from offline_kto.kto_core.feedback.records import parse_record
from offline_kto.precompute.records.sources import SourceFile, describe_source, read_records, warnings_about

ROWS = [
    {"prompt": "2+2=", "completion": " 4", "label": True},
    {"prompt": "caf\u00e9, \u4f60\u597d", "completion": 'a "b",\nc', "label": False},
    {"prompt": "x", "completion": "y\tz", "label": True},
]


def read(path, **options):
    return list(read_records(str(path), **options))


def save(path, content):
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def refusal(path, start=None):
    """The message of the error, which begins with the place, is one line and can be printed."""
    with pytest.raises(FeedbackError) as caught:
        read(path)
    message = str(caught.value)
    assert message.startswith(f"{os.path.basename(path) if start is None else start}: ")
    assert message.isprintable()
    return message


def jsonl(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def as_csv(rows, delimiter=",", lineterminator="\r\n"):
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(rows[0]), delimiter=delimiter, lineterminator=lineterminator)
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def parquet(path, rows):
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


# JSON lines


def test_jsonl_lines_are_numbered_with_blank_ones(tmp_path):
    lines = [json.dumps(row) for row in ROWS]
    path = save(tmp_path / "f.jsonl", f"{lines[0]}\n\n{lines[1]}\r\n  \n{lines[2]}")
    assert read(path) == [("f.jsonl:1", ROWS[0]), ("f.jsonl:3", ROWS[1]), ("f.jsonl:5", ROWS[2])]


def test_other_line_breaks_stay_inside_their_line(tmp_path):
    row = {"prompt": "a\u2028b\x0c\x85", "completion": "c\u2029", "label": True}
    path = save(tmp_path / "f.ndjson", json.dumps(row, ensure_ascii=False) + "\n" + jsonl(ROWS))
    assert [where for where, _ in read(path)] == ["f.ndjson:1", "f.ndjson:2", "f.ndjson:3", "f.ndjson:4"]
    assert read(path)[0][1] == row


def test_limit_reads_no_further(tmp_path):
    path = save(tmp_path / "f.jsonl", jsonl(ROWS[:2]) + "broken\n")
    assert [row for _, row in read(path, limit=2)] == ROWS[:2]
    assert read(path, limit=0) == []
    assert "f.jsonl:3: not valid JSON" in refusal(path, "f.jsonl:3")


def test_jsonl_streams(tmp_path):
    path = save(tmp_path / "f.jsonl", jsonl(ROWS[:1]) + "broken\n")
    records = read_records(str(path))
    assert next(records) == ("f.jsonl:1", ROWS[0])
    with pytest.raises(FeedbackError, match=r"^f.jsonl:2: "):
        next(records)


@pytest.mark.parametrize("line", ["{'prompt': 1}", '{"a": 1,}', '{"a": 1} x', "{", '{"a": 1}{"a": 2}', "NULL", '"a'])
def test_bad_json_in_the_middle_names_line_and_column(tmp_path, line):
    message = refusal(save(tmp_path / "f.jsonl", f"{jsonl(ROWS)}{line}\n{jsonl(ROWS)}"), "f.jsonl:4")
    assert "not valid JSON" in message
    assert "(column " in message


@pytest.mark.parametrize("end", ["\n", ""])
def test_commas_between_lines_of_json_are_explained(tmp_path, end):
    text = ",\n".join(json.dumps(row) for row in ROWS) + "," + end
    assert "there is a comma after the object" in refusal(save(tmp_path / "f.jsonl", text), "f.jsonl:1")
    last = jsonl(ROWS) + json.dumps(ROWS[0]) + "," + end
    assert "remove the comma" in refusal(save(tmp_path / "f.jsonl", last), "f.jsonl:4")


@pytest.mark.parametrize("line", ["3", "null", "[1]", '"text"', "true", "NaN"])
def test_jsonl_items_must_be_objects(tmp_path, line):
    assert f"got {line}" in refusal(save(tmp_path / "f.jsonl", f"{jsonl(ROWS)}{line}\n"), "f.jsonl:4")


def test_every_truncation_of_the_last_line_is_noticed(tmp_path):
    last = json.dumps({"prompt": "q \u00e9 {x}", "n": [1, 2], "label": True}, ensure_ascii=False).encode()
    for size in range(1, len(last)):
        path = save(tmp_path / "f.jsonl", jsonl(ROWS).encode() + last[:size])
        assert "truncated" in refusal(path, "f.jsonl:4"), last[:size]
    assert len(read(save(path, jsonl(ROWS).encode() + last))) == 4


@pytest.mark.parametrize("name", ["f.jsonl", "f.ndjson", "f.json", "f.jsonl.gz"])
@pytest.mark.parametrize("start", ["", "\ufeff", "\n \n"])
@pytest.mark.parametrize("line_end", ["\n", "\r\n"])
def test_the_content_of_a_json_file_says_how_to_read_it(tmp_path, name, start, line_end):
    """An array under the name of lines, lines under the name of an array, objects over several lines."""
    pretty = "".join(json.dumps(row, indent=2) + "\n" for row in ROWS)
    first = 1 + start.count("\n")
    for text, lines in (
        (json.dumps(ROWS), [first, f"{first} (record 2)", f"{first} (record 3)"]),
        (json.dumps(ROWS, indent=1), [first + 1, first + 6, first + 11]),
        (jsonl(ROWS), [first, first + 1, first + 2]),
        (pretty, [first, first + 5, first + 10]),
    ):
        content = (start + text).replace("\n", line_end).encode()
        path = save(tmp_path / name, gzip.compress(content) if name.endswith(".gz") else content)
        assert read(path) == [(f"{name}:{line}", row) for line, row in zip(lines, ROWS, strict=True)]


def test_jsonl_of_files_with_marks_one_behind_the_other(tmp_path):
    path = save(tmp_path / "f.jsonl", ("\ufeff" + jsonl(ROWS[:1])) * 2)
    assert [row for _, row in read(path)] == ROWS[:1] * 2


@pytest.mark.parametrize("text", ['[{"a": 1},\n{"a": }]', '{\n"a": }\n'])
def test_a_broken_document_under_another_name_names_its_line(tmp_path, text):
    assert "not valid JSON" in refusal(save(tmp_path / "f.jsonl", text), "f.jsonl:2")


def test_deep_nesting_and_huge_numbers(tmp_path):
    for line in ('{"a": ' + "[" * 200_000 + "]" * 200_000 + "}", '{"a": ' + "9" * 5000 + "}"):
        assert len(refusal(save(tmp_path / "f.jsonl", jsonl(ROWS) + line + "\n"), "f.jsonl:4")) < 300
        assert len(refusal(save(tmp_path / "f.json", jsonl(ROWS) + line + "\n"), "f.json:4")) < 300
        assert len(refusal(save(tmp_path / "f.json", f"[{{}},\n{line}]"), "f.json:2")) < 300


# JSON


@pytest.mark.parametrize("indent", [None, 2])
def test_json_array_items_have_the_line_they_begin_on(tmp_path, indent):
    text = "\n" + json.dumps(ROWS, indent=indent) + "\n"
    lines = [2, "2 (record 2)", "2 (record 3)"] if indent is None else [3, 8, 13]
    assert read(save(tmp_path / "f.json", text)) == [(f"f.json:{n}", row) for n, row in zip(lines, ROWS, strict=True)]


def test_json_array_laid_out_oddly(tmp_path):
    path = save(tmp_path / "f.json", '[{"a": 1}\n\n,\n {"a":\n 2}, {"a": 3}\n]')
    assert read(path) == [("f.json:1", {"a": 1}), ("f.json:4", {"a": 2}), ("f.json:5", {"a": 3})]


def test_json_suffix_with_json_lines(tmp_path):
    assert read(save(tmp_path / "f.json", "\n" + jsonl(ROWS)))[2] == ("f.json:4", ROWS[2])
    pretty = "\n".join(json.dumps(row, indent=2) for row in ROWS)
    assert [where for where, _ in read(save(tmp_path / "f.json", pretty))] == [
        "f.json:1",
        "f.json:6",
        "f.json:11",
    ]
    assert read(save(tmp_path / "f.json", json.dumps(ROWS[0]))) == [("f.json:1", ROWS[0])]


def test_json_with_a_wrapper_is_one_record(tmp_path):
    document = {"version": 1, "data": ROWS}  # `documents` finds the records in it
    assert read(save(tmp_path / "f.json", json.dumps(document))) == [("f.json:1", document)]


def test_a_data_column_is_no_wrapper(tmp_path):
    rows = [{"data": [1]}, {"data": [2]}]
    assert [row for _, row in read(save(tmp_path / "f.json", jsonl(rows)))] == rows


@pytest.mark.parametrize(
    ("text", "line", "part"),
    [
        ('[{"a": 1},\n{"a": 2}\n{"a": 3}]', 3, "Expecting ',' or ']'"),
        ('[{"a": 1},\n{"a": }]', 2, "not valid JSON"),
        ('[{"a": 1},\n{"a": "x\ny"}]', 2, "not valid JSON"),
        ('[{"a": 1},\n]', 2, "not valid JSON"),
        ('[{"a": 1},\n\n3]', 3, "must be a JSON object, got 3"),
        ('[{"a": 1}]\n\n[]', 3, "text after the array"),
        ('{"a": 1}\n{"a": }\n{"a": 2}\n', 2, "not valid JSON"),
        ('{"a": 1}\n3\n', 2, "must be a JSON object, got 3"),
        ("text\n", 1, "not valid JSON"),
    ],
)
def test_broken_json_names_the_line(tmp_path, text, line, part):
    assert part in refusal(save(tmp_path / "f.json", text), f"f.json:{line}")


@pytest.mark.parametrize("indent", [None, 1])
def test_every_truncation_of_an_array_is_noticed(tmp_path, indent):
    text = json.dumps([{"a": "x {y}"}, {"b": [1, True]}], indent=indent)
    for size in range(1, len(text)):
        path = save(tmp_path / "f.json", text[:size])
        assert "truncated" in refusal(path, f"f.json:{1 + text[:size].rstrip().count(chr(10))}"), text[:size]


# CSV


def test_csv_records_have_the_line_they_begin_on(tmp_path):
    rows = [{**row, "label": str(row["label"])} for row in ROWS]
    path = save(tmp_path / "f.csv", as_csv(rows))
    assert read(path) == [("f.csv:2", rows[0]), ("f.csv:3", rows[1]), ("f.csv:5", rows[2])]
    path = save(tmp_path / "f.tsv", "\n" + as_csv(rows, "\t", "\n").replace("\nx", "\n\nx"))
    assert read(path) == [("f.tsv:3", rows[0]), ("f.tsv:4", rows[1]), ("f.tsv:7", rows[2])]


def test_csv_empty_cells_are_none_and_the_index_of_pandas_is_left_out(tmp_path):
    path = save(tmp_path / "f.csv", ', prompt ,label,chosen\n0,q,,""\n1,r,0, \n')
    assert [row for _, row in read(path)] == [
        {"prompt": "q", "label": None, "chosen": None},
        {"prompt": "r", "label": "0", "chosen": " "},
    ]


@pytest.mark.parametrize(
    ("text", "records"),
    [
        ("a,b,\n1,x,NO wrong\n2,y,\n", [{"a": "1", "b": "x", "(column 3)": "NO wrong"}, {"a": "2", "b": "y"}]),
        (",a,b\n0,1,x\nk,2,y\n", [{"a": "1", "b": "x"}, {"a": "2", "b": "y", "(column 1)": "k"}]),
        ("a,,b,\n1,0,x, \n", [{"a": "1", "b": "x", "(column 2)": "0"}]),
    ],
)
def test_csv_columns_without_a_name_are_numbered_if_they_have_a_value(tmp_path, text, records):
    assert [record for _, record in read(save(tmp_path / "f.csv", text))] == records


@pytest.mark.parametrize(
    ("text", "record"),
    [
        ("p, r, l\nA?, b, 1\n", {"p": "A?", "r": "b", "l": "1"}),
        ('"p", "r", "l"\n"A, B?", "b, c", "1"\n', {"p": "A, B?", "r": "b, c", "l": "1"}),
        ("p; r\nA?;  b\n", {"p": "A?", "r": "b"}),
        ("p,r,l\nA?, b,1\n", {"p": "A?", "r": " b", "l": "1"}),
        ("p, r,l\nA?, b,1\n", {"p": "A?", "r": " b", "l": "1"}),
    ],
)
def test_csv_spaces_after_separators_belong_to_no_cell_if_the_header_has_them(tmp_path, text, record):
    assert [one for _, one in read(save(tmp_path / "f.csv", text))] == [record]


def test_csv_cells_longer_than_the_default_limit(tmp_path):
    row = {"prompt": "q", "completion": "x" * 300_000}
    assert read(save(tmp_path / "f.csv", as_csv([row]))) == [("f.csv:2", row)]


def test_csv_cells_stay_text(tmp_path):
    cell = json.dumps([{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}])
    row = {"messages": cell, "conversations": " " + cell, "prompt": cell, "label": "good"}
    assert read(save(tmp_path / "f.csv", as_csv([row])))[0][1] == row


@pytest.mark.parametrize("header", ["a;b", "a\tb", "sep=;\na;b", '"a";"b"'])
def test_csv_of_excel_is_read_with_its_own_separator(tmp_path, header):
    mark = "\t" if "\t" in header else ";"
    path = save(tmp_path / "f.csv", f'{header}\n1{mark}"2, and {mark}"\n')
    assert read(path) == [(f"f.csv:{2 + header.count(chr(10))}", {"a": "1", "b": f"2, and {mark}"})]


@pytest.mark.parametrize(
    ("text", "line", "part"),
    [
        (
            "prompt|label\na|1\n",
            1,
            'the single column "prompt|label", with "|" between words. Separate columns by commas',
        ),
        ("prompt\na\n", 1, "commas"),
        ("prompt;label\na,1\n", 2, "1 cells under a header of 2"),
        ("a,b,a\n1,2,3\n", 1, 'two columns have the name "a"'),
        ("a,b\n1,2\n\n3\n", 4, "1 cells under a header of 2"),
        ("a,b\n1,2,3\n", 2, "3 cells under a header of 2"),
        ('a,b\n"1\n2",3\n4,"5\n6', 4, "never closed"),
        ('a,b\n"1"2,3\n', 2, "quotes"),
        ("a,b\n1,2\r3,4\n", 2, "carriage return"),
    ],
)
def test_broken_csv_names_the_line(tmp_path, text, line, part):
    assert part in refusal(save(tmp_path / "f.csv", text), f"f.csv:{line}")


# Encodings, gzip, empty files


@pytest.mark.parametrize("name", ["f.jsonl", "f.json", "f.csv"])
def test_byte_order_mark_is_skipped(tmp_path, name):
    text = {"f.jsonl": '{"a": "1", "b": "2"}', "f.json": '[{"a": "1", "b": "2"}]', "f.csv": "a,b\n1,2"}[name]
    assert read(save(tmp_path / name, text.encode("utf-8-sig")))[0][1] == {"a": "1", "b": "2"}


@pytest.mark.parametrize("name", ["f.jsonl", "f.json", "f.csv", "f.jsonl.gz"])
def test_other_encodings_are_named_with_the_line(tmp_path, name):
    text = "a,b\n1,2\n\u00e9,3\n" if name == "f.csv" else '{"a": 1}\n{"a": 2}\n{"a": "\u00e9t\u00e9"}\n'
    content = text.encode("cp1252")
    if name.endswith(".gz"):
        content = gzip.compress(content)
    message = refusal(save(tmp_path / name, content), f"{name}:3")
    assert "not UTF-8 (byte 0xe9)" in message
    assert "iconv -f cp1252 -t utf-8" in message


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be"])
@pytest.mark.parametrize("name", ["f.jsonl", "f.json", "f.csv", "f.jsonl.gz"])
def test_utf_16_with_a_byte_order_mark_is_read(tmp_path, name, encoding):
    text = "a,b\n\U0001f44d\u2028,2\n" if name == "f.csv" else '{"a": "\U0001f44d\u2028", "b": "2"}\n'
    content = text.encode(encoding) if encoding == "utf-16" else ("\ufeff" + text).encode(encoding)
    content = gzip.compress(content) if name.endswith(".gz") else content
    where = f"{name}:{2 if name == 'f.csv' else 1}"
    assert read(save(tmp_path / name, content)) == [(where, {"a": "\U0001f44d\u2028", "b": "2"})]


def test_utf_16_that_is_cut_or_has_no_mark_is_refused(tmp_path):
    whole = jsonl(ROWS).encode("utf-16")
    assert "UTF-16" in refusal(save(tmp_path / "f.jsonl", whole[:-1]))
    refusal(save(tmp_path / "f.jsonl", whole[2:]), "f.jsonl:1")


@pytest.mark.parametrize("name", ["f.jsonl.gz", "f.json.gz", "f.csv.gz", "F.TSV.GZ"])
def test_gzip(tmp_path, name):
    text = {
        "jsonl": '{"a": "1", "b": "2"}\n',
        "json": '[\n{"a": "1", "b": "2"}]',
        "csv": "a,b\n1,2\n",
        "TSV": "a\tb\n1\t2",
    }
    path = save(tmp_path / name, gzip.compress(text[name.split(".")[1]].encode()))
    assert read(path) == [(f"{name}:{1 if 'jsonl' in name else 2}", {"a": "1", "b": "2"})]


def test_broken_gzip(tmp_path):
    packed = gzip.compress(jsonl(ROWS * 50).encode())
    assert "truncated" in refusal(save(tmp_path / "f.jsonl.gz", packed[:-9]))
    damaged = packed[:40] + bytes(byte ^ 255 for byte in packed[40:50]) + packed[50:]
    assert "gzip" in refusal(save(tmp_path / "f.jsonl.gz", damaged))
    assert "Remove .gz" in refusal(save(tmp_path / "f.jsonl.gz", jsonl(ROWS)))


@pytest.mark.parametrize("content", ["", "\n", "\n\n"])
@pytest.mark.parametrize("name", ["f.jsonl", "f.json", "f.csv", "f.tsv"])
def test_empty_files(tmp_path, name, content):
    assert "without any record" in refusal(save(tmp_path / name, content))


def test_files_without_records(tmp_path):
    for name, content in (("f.json", "[ ]"), ("f.csv", "a,b\n"), ("f.jsonl.gz", gzip.compress(b""))):
        assert "without any record" in refusal(save(tmp_path / name, content))
    table = pa.table({"prompt": pa.array([], pa.string())})
    pq.write_table(table, tmp_path / "f.parquet")
    assert "without any record" in refusal(tmp_path / "f.parquet")


# Parquet


def test_parquet_rows_and_values(tmp_path):
    rows = [{"prompt": "a", "label": True, "n": 1}, {"prompt": "b", "label": None, "n": None}]
    assert read(parquet(tmp_path / "f.parquet", rows)) == [
        ("f.parquet: row 1", rows[0]),
        ("f.parquet: row 2", rows[1]),
    ]


def test_parquet_drops_keys_that_only_other_rows_have(tmp_path):
    turns = [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "a", "tool_calls": [{"id": "1"}]},
    ]
    kwargs = [{"thinking": True}, {"effort": "low"}]
    rows = [{"messages": turns, "chat_template_kwargs": item, "label": None} for item in kwargs]
    assert [row for _, row in read(parquet(tmp_path / "f.parquet", rows))] == rows


def test_parquet_reads_in_batches(tmp_path, monkeypatch):
    sizes = []
    iter_batches = pq.ParquetFile.iter_batches

    def spy(self, **options):
        for batch in iter_batches(self, **options):
            sizes.append(batch.num_rows)
            yield batch

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", spy)
    path = parquet(tmp_path / "f.parquet", [{"n": n} for n in range(1000)])
    assert [row["n"] for _, row in read(path, limit=300)] == list(range(300))
    assert sum(sizes) < 1000
    assert [(where, row["n"]) for where, row in read(path)][-1] == ("f.parquet: row 1000", 999)
    assert max(sizes) <= 256


@pytest.mark.parametrize("damage", ["text", "cut", "middle"])
def test_corrupt_parquet(tmp_path, damage):
    path = parquet(tmp_path / "f.parquet", [{"text": "x" * 50 + str(n)} for n in range(1000)])
    content = path.read_bytes()
    half = len(content) // 2
    save(
        path,
        {
            "text": b"no parquet",
            "cut": content[:half],
            "middle": content[:4] + bytes(half) + content[half + 4 :],
        }[damage],
    )
    assert "not readable as Parquet" in refusal(path)


# Paths


def test_missing_file_suggests_its_neighbours(tmp_path):
    save(tmp_path / "feedback.jsonl", jsonl(ROWS))
    message = refusal(tmp_path / "feedbak.jsonl", tmp_path / "feedbak.jsonl")
    assert "Did you mean feedback.jsonl?" in message
    missing = tmp_path / "nowhere" / "f.jsonl"
    assert "cannot be listed" in refusal(missing, missing)


def test_bare_names_are_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save(tmp_path / "imdb.json", "[]")
    assert "no such file. Did you mean imdb.json?" in refusal("imdb")
    assert "no such file" in refusal("owner/name.jsonl", "owner/name.jsonl")
    assert "no such file" in refusal("a/b/c", "a/b/c")
    assert "no such file" in refusal("bad\0name", "bad\\x00name")
    assert "no such file" in refusal("~nobody-of-this-name/f.jsonl", "~nobody-of-this-name/f.jsonl")
    assert "no such file" in refusal("x" * 5000, "x" * 197 + "...")
    for empty in ("", "  "):
        with pytest.raises(FeedbackError, match="--data is empty"):
            read_records(empty)


@pytest.mark.parametrize("name", ["f.txt", "f", "f.parquet.gz", "f.xlsx", "f.gz", ".jsonl"])
def test_unknown_kinds_of_files(tmp_path, name):
    path = save(tmp_path / name, jsonl(ROWS))
    message = refusal(path)
    assert ".jsonl .ndjson .json .csv .tsv .parquet" in message
    with pytest.raises(FeedbackError, match="unknown kind"):
        describe_source(str(path))


@pytest.mark.parametrize("name", ["f.xlsx", "f.XLS", "f.ods"])
def test_a_spreadsheet_says_how_to_save_it(tmp_path, name):
    (tmp_path / name).write_bytes(b"PK")
    with pytest.raises(FeedbackError, match=r"Save the sheet as CSV"):
        list(read_records(str(tmp_path / name)))


def test_special_files(tmp_path):
    os.mkfifo(tmp_path / "f.jsonl")
    assert "neither a file nor a folder" in refusal(tmp_path / "f.jsonl", tmp_path / "f.jsonl")


def test_no_permission(tmp_path, monkeypatch):
    # Permission bits do not stop the superuser, under which tests often run.
    def closed(*_args, **_options):
        raise PermissionError(13, "Permission denied")

    for name in ("f.jsonl", "f.parquet"):
        path = save(tmp_path / name, jsonl(ROWS))
        with monkeypatch.context() as patch:
            patch.setattr("pathlib.Path.open", closed)
            assert "no permission" in refusal(path)
            with pytest.raises(FeedbackError, match="no permission"):
                describe_source(str(path))
    monkeypatch.setattr("pathlib.Path.stat", closed)
    assert "no permission" in refusal(path, path)


# Folders and the hub


@pytest.fixture
def datasets_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "set").mkdir()
    return tmp_path / "set"


def test_saved_dataset(folder):
    datasets.Dataset.from_list(ROWS).save_to_disk(folder)
    assert read(folder) == [(f"set: row {n}", row) for n, row in enumerate(ROWS, 1)]
    assert read(folder, limit=1) == [("set: row 1", ROWS[0])]


def test_saved_splits(folder):
    one, two = datasets.Dataset.from_list(ROWS), datasets.Dataset.from_list(ROWS[:1])
    datasets.DatasetDict(train=one, test=two).save_to_disk(folder / "a")
    assert [row for _, row in read(folder / "a")] == ROWS
    datasets.DatasetDict(train_prefs=one, test=two).save_to_disk(folder / "b")
    assert '["train_prefs", "test"]' in refusal(folder / "b")


def test_damaged_dataset(folder):
    save(folder / "dataset_info.json", "{}")
    save(folder / "state.json", "{")
    assert "not readable as a dataset" in refusal(folder)


@pytest.mark.usefixtures("datasets_cache")
@pytest.mark.parametrize("saved", [True, False])
def test_the_split_that_is_read_and_the_others_are_named(tmp_path, saved):
    folder = tmp_path / "set"
    if saved:
        dataset = datasets.Dataset.from_list([{"a": 1}])
        datasets.DatasetDict({"train": dataset, "test": dataset}).save_to_disk(folder)
    else:
        folder.mkdir()
        for name in ("train", "test"):
            save(folder / f"{name}.jsonl", jsonl(ROWS))
    assert warnings_about(str(folder)) == [f'{folder}: the split "train" is read; --split chooses another: "test".']
    assert warnings_about(str(folder), "test") == [
        f'{folder}: the split "test" is read; --split chooses another: "train".'
    ]


@pytest.mark.usefixtures("datasets_cache")
@pytest.mark.parametrize("saved", [True, False])
def test_a_folder_with_one_split_needs_no_word(tmp_path, saved):
    folder = tmp_path / "set"
    if saved:
        datasets.Dataset.from_list([{"a": 1}]).save_to_disk(folder)
    else:
        folder.mkdir()
        save(folder / "a.jsonl", jsonl(ROWS))
    assert warnings_about(str(folder)) == []


@pytest.mark.usefixtures("datasets_cache")
@pytest.mark.parametrize(
    ("names", "unread"),
    [
        (["train.jsonl", "more.jsonl", "test.jsonl"], ["more.jsonl"]),
        (["a.jsonl", "B.JSONL"], ["B.JSONL"]),
        (["a.jsonl", "new\nline.jsonl"], ["new\\nline.jsonl"]),
        (["a.jsonl", "sub/b.ndjson"], []),
        (["a.ndjson"], []),
        (["train.jsonl", "test.jsonl"], []),
    ],
)
def test_files_of_a_folder_that_are_not_read_are_named(folder, names, unread):
    (folder / "sub").mkdir()
    for name in names:
        save(folder / name, jsonl(ROWS))
    left = [name for name in names if "test" not in name and json.dumps(name)[1:-1] not in unread]
    assert [row for _, row in read(folder)] == ROWS * len(left)
    said = " ".join(one for one in warnings_about(str(folder)) if "not read" in one)
    assert bool(said) == bool(unread)
    assert all(f'"{name}"' in said for name in unread)


@pytest.mark.usefixtures("datasets_cache")
@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet", "jsonl.gz"])
@pytest.mark.parametrize("begin", ["train", "data/train", "part"])
def test_a_part_of_a_whole_that_is_missing_is_named(folder, suffix, begin):
    (folder / "data").mkdir()
    names = [f"{begin}-{number:05}-of-00003.{suffix}" for number in range(3)]
    for name in names:
        if suffix == "parquet":
            pq.write_table(pa.Table.from_pylist(ROWS), folder / name)
        else:
            text = (jsonl(ROWS) if suffix.startswith("jsonl") else as_csv(ROWS)).encode()
            save(folder / name, gzip.compress(text) if suffix.endswith("gz") else text)
    assert len(read(folder)) == 3 * len(ROWS)
    (folder / names[1]).unlink()
    with pytest.raises(FeedbackError, match=r"2 of 3 parts are there; missing: ") as caught:
        read(folder)
    assert f'["{os.path.basename(names[1])}"]' in str(caught.value)


@pytest.mark.usefixtures("datasets_cache")
def test_parts_may_be_numbered_from_1(folder):
    for number in (1, 2):
        save(folder / f"part-0000{number}-of-00002.jsonl", jsonl(ROWS))
    assert len(read(folder)) == 2 * len(ROWS)


@pytest.mark.usefixtures("datasets_cache")
@pytest.mark.parametrize("name", ["a.jsonl.bak", "a.jsonl.tmp", "a.jsonl~", "a.jsonl.old", "a.jsonl.swp", "~a.jsonl"])
def test_backups_in_a_folder_are_not_read(folder, name):
    save(folder / "a.jsonl", jsonl(ROWS))
    save(folder / name, "{")
    assert [row for _, row in read(folder)] == ROWS
    assert warnings_about(str(folder)) == [f'{folder}: backups and temporary copies are not read: "{name}".']


@pytest.mark.usefixtures("datasets_cache")
def test_a_folder_of_tsv_files_is_read(folder):
    save(folder / "a.tsv", as_csv(ROWS[:1], delimiter="\t"))
    assert len(read(folder)) == 1


@pytest.mark.usefixtures("datasets_cache")
@pytest.mark.parametrize("name", ["f.jsonl", "f.csv", "f.parquet", "data/train.jsonl"])
def test_folder_of_data_files(folder, name):
    (folder / "data").mkdir()
    if name == "f.parquet":
        parquet(folder / name, ROWS)
    else:
        save(folder / name, as_csv(ROWS) if name == "f.csv" else jsonl(ROWS))
    save(folder / "README.md", "# rows")
    alone = read(folder / name)
    assert read(folder) == [(f"{Path(name).parent / where}", row) for where, row in alone]
    content = (folder / name).read_bytes()
    assert describe_source(str(folder)) == [
        SourceFile(os.path.basename(name), hashlib.sha256(content).hexdigest(), len(content))
    ]


@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_a_key_with_two_values_is_refused(tmp_path, name):
    content = '{"prompt": "a", "completion": "b",\n "label": true, "label": false}'
    content = f"[{content}]" if name == "a.json" else content.replace("\n", "")
    message = refusal(save(tmp_path / name, content), f"{name}:1")
    assert '"label" occurs twice, with true and false' in message
    assert read(save(tmp_path / name, content.replace("false", "true")))[0][1]["label"] is True


@pytest.mark.parametrize(
    ("name", "content", "form"),
    [
        ("a.jsonl", gzip.compress(jsonl(ROWS).encode()), "gzip data. Add .gz"),
        ("a.jsonl.gz", gzip.compress(gzip.compress(jsonl(ROWS).encode())), "gzip data"),
        ("a.csv", b"PK\x03\x04\x14\x00", "a zip archive"),
        ("a.json.gz", b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "a git LFS pointer"),
        ("a.parquet", b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "a git LFS pointer"),
        ("a.parquet", b"\x28\xb5\x2f\xfd1234", "zstandard data"),
    ],
)
def test_a_file_of_another_kind_than_its_name_says_is_named(tmp_path, name, content, form):
    assert f"the content is {form}" in refusal(save(tmp_path / name, content))


def test_parquet_under_another_name_is_named(tmp_path):
    parquet(tmp_path / "a.parquet", ROWS)
    (tmp_path / "a.parquet").rename(tmp_path / "a.json")
    assert "the content is Parquet data. End its name in .parquet" in refusal(tmp_path / "a.json")


def test_parquet_columns_of_one_name_are_refused(tmp_path):
    columns = [pa.array([value]) for value in ("a", "b", True, False)]
    table = pa.Table.from_arrays(columns, names=["prompt", "completion", "label", "label"])
    pq.write_table(table, tmp_path / "a.parquet")
    assert 'two columns have the name "label"' in refusal(tmp_path / "a.parquet")


@pytest.mark.usefixtures("datasets_cache")
def test_folder_of_data_files_without_train(folder):
    save(folder / "test.jsonl", jsonl(ROWS))
    assert "train" in refusal(folder)


@pytest.mark.usefixtures("datasets_cache")
@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.parquet", "a.jsonl.gz", "train/a.jsonl"])
@pytest.mark.parametrize("kept", ["time", "time and size"])
def test_a_file_that_changed_under_its_old_time_is_read_as_it_is(folder, name, kept):
    """Keep the old time, as rsync -t, cp -p, tar and SOURCE_DATE_EPOCH do; hash and rows are of the same bytes."""
    (folder / "train").mkdir()
    path = folder / name

    def write(label):
        rows = [{"prompt": f"p{i}", "completion": "c", "label": label} for i in range(3)]
        if name.endswith(".parquet"):
            pq.write_table(pa.Table.from_pylist(rows), path)
        elif name.endswith(".csv"):
            save(path, as_csv([{**row, "label": str(row["label"]).lower()} for row in rows]))
        else:
            text = json.dumps(rows) if name == "a.json" else jsonl(rows)
            path.write_bytes(gzip.compress(text.encode(), mtime=0) if name.endswith(".gz") else text.encode())
        os.utime(path, ns=(10**18, 10**18))

    for label in (True, False) if kept == "time" else (1, 0):
        write(label)
        assert [str(row["label"]).lower() for _, row in read(folder)] == [str(label).lower()] * 3
        (described,) = describe_source(str(folder))
        assert described.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.usefixtures("datasets_cache")
def test_what_is_hashed_of_a_folder_is_what_is_read(folder, tmp_path):
    """Files deep down and behind links."""
    for number, name in enumerate(("a.jsonl", "deep/er/b.jsonl", "deep/_x.jsonl", "elsewhere/c.jsonl")):
        path = tmp_path / name if name.startswith("elsewhere") else folder / name
        path.parent.mkdir(exist_ok=True, parents=True)
        save(path, jsonl([{"prompt": name, "completion": str(number), "label": True}]))
    (folder / "link.jsonl").symlink_to(tmp_path / "elsewhere" / "c.jsonl")
    (tmp_path / "other name").symlink_to(folder)
    for path in (folder, tmp_path / "other name"):
        places = [where.rpartition(":")[0] for where, _ in read(path)]
        assert all((folder / place).is_file() for place in places)
        expected = sorted(
            (Path(place).name, hashlib.sha256((folder / place).read_bytes()).hexdigest()) for place in places
        )
        assert sorted((file.name, file.sha256) for file in describe_source(str(path))) == expected


def test_folders_without_a_dataset(folder):
    save(folder / "notes.txt", "x")
    save(folder / ".hidden.jsonl", jsonl(ROWS))
    (folder / "x.jsonl").mkdir()
    assert "without a dataset" in refusal(folder)
    with pytest.raises(FeedbackError, match="without a dataset"):
        describe_source(str(folder))
    save(folder / "a.jsonl", jsonl(ROWS))
    save(folder / "b.csv", as_csv(ROWS))
    assert "several kinds, .csv, .json" in refusal(folder)


def test_reference_cache_is_no_feedback(folder):
    save(folder / "manifest.json", "{}")
    (folder / "train").mkdir()
    parquet(folder / "train" / "00000.parquet", ROWS)
    assert "reference cache" in refusal(folder)
    with pytest.raises(FeedbackError, match="reference cache"):
        describe_source(str(folder))


def test_hub_id(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    asked = []

    def load_dataset(name, *, split):
        asked.append((name, split))
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert read("owner/na.me-1") == [(f"owner/na.me-1: row {n}", row) for n, row in enumerate(ROWS, 1)]
    assert asked == [("owner/na.me-1", "train")]


def test_hub_failures_are_one_line(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)

    def load_dataset(_name, *, split):
        raise ConnectionError(f"no route for {split}\nsecond line")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    message = refusal("owner/name", "owner/name")
    assert "neither a local path nor readable from the hub (no route for train). Check the name" in message
    (tmp_path / "owner").mkdir()
    save(tmp_path / "owner" / "names", "")
    assert "Did you mean names?" in refusal("owner/name", "owner/name")
    with pytest.raises(FeedbackError) as caught:
        describe_source("owner/name")
    assert isinstance(caught.value.__cause__, ConnectionError)


def test_failures_while_a_dataset_is_read(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)

    def load_dataset(_name, *, split):
        assert split == "train"
        yield ROWS[0]
        raise ValueError("no decoder")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert "after row 1 (no decoder)" in refusal("owner/name", "owner/name")


def test_a_folder_is_preferred_to_the_hub(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "owner" / "name")
    monkeypatch.setattr(datasets, "load_dataset", None)
    assert read("owner/name")[0][0] == "name: row 1"


# Descriptions


def test_describe_file(tmp_path):
    path = save(tmp_path / "f.jsonl", jsonl(ROWS))
    expected = [SourceFile("f.jsonl", hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_size)]
    assert describe_source(str(path)) == expected
    (tmp_path / "deeper").mkdir()
    path.rename(tmp_path / "deeper" / "f.jsonl")
    assert describe_source(str(tmp_path / "deeper" / "f.jsonl")) == expected
    save(path, jsonl(ROWS[:2]))
    assert describe_source(str(path)) != expected
    with pytest.raises(FeedbackError, match="no such file"):
        describe_source(str(tmp_path / "none.jsonl"))


def test_describe_folder_in_order(folder):
    for name in ("b.jsonl", "a.jsonl", "a/c.jsonl"):
        (folder / name).parent.mkdir(exist_ok=True)
        save(folder / name, name)
    assert [(file.name, file.bytes) for file in describe_source(str(folder))] == [
        ("c.jsonl", 9),
        ("a.jsonl", 7),
        ("b.jsonl", 7),
    ]


def test_describe_dataset_by_its_rows(folder):
    datasets.Dataset.from_list(ROWS).save_to_disk(folder / "a" / "set")
    datasets.Dataset.from_list(ROWS).save_to_disk(folder / "b" / "set", num_shards=2)
    (file,) = describe_source(str(folder / "a" / "set"))
    assert [file] == describe_source(str(folder / "b" / "set"))
    lines = [json.dumps(row, sort_keys=True) + "\n" for row in ROWS]
    assert file == SourceFile("set", hashlib.sha256("".join(lines).encode()).hexdigest(), len("".join(lines)))


# Every format reads back alike

text = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=12)
spoken = text.filter(lambda value: value.strip())
labelled = st.fixed_dictionaries({"prompt": spoken, "completion": spoken, "label": st.booleans()})
conversations = st.builds(
    lambda texts, calls, label: {
        "messages": [
            *({"role": "assistant" if n % 2 else "user", "content": text} for n, text in enumerate(texts)),
            {"role": "assistant", "content": "", "tool_calls": calls},
        ],
        "label": label,
    },
    st.lists(spoken, min_size=1, max_size=3),
    st.lists(st.fixed_dictionaries({"id": text}), min_size=1, max_size=2),
    st.sampled_from([0, 1, True, False]),
).map(lambda record: {**record, "label": bool(record["label"])})
prefers = st.fixed_dictionaries({"prompt": spoken, "chosen": spoken, "rejected": spoken}).filter(
    lambda record: record["chosen"] != record["rejected"]
)


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    return tmp_path_factory.mktemp("formats")


@settings(deadline=None, max_examples=60)
@given(rows=st.lists(labelled | conversations | prefers, min_size=1, max_size=5))
def test_all_formats_give_equal_rows(scratch, rows):
    columns = list(dict.fromkeys(key for row in rows for key in row))
    table = [{key: row.get(key) for key in columns} for row in rows]
    cells = [{k: json.dumps(v) if isinstance(v, list) else v for k, v in row.items()} for row in table]
    contents = {
        "f.jsonl": jsonl(rows),
        "f.ndjson": jsonl(table),
        "f.json": json.dumps(rows, indent=1, ensure_ascii=False),
        "lines.json": jsonl(rows),
        "f.csv": as_csv(cells),
        "f.tsv": as_csv(cells, "\t"),
    }
    for name, content in contents.items():
        save(scratch / name, content)
        save(scratch / f"{name}.gz", gzip.compress(content.encode()))
    parquet(scratch / "f.parquet", table)
    names = [*contents, *(f"{name}.gz" for name in contents), "f.parquet"]
    expected = [parse_record(row, "", FeedbackFields()) for row in rows]
    for name in names:
        records = read(scratch / name)
        assert [parse_record(record, "", FeedbackFields()) for _, record in records] == expected, name


@settings(deadline=None)
@given(st.binary(max_size=60) | st.text(alphabet='[]{}":,\n\r\t ea1\\\u00e9').map(str.encode), st.data())
def test_any_bytes_give_objects_or_a_feedback_error(scratch, content, data):
    name = data.draw(st.sampled_from(["g.jsonl", "g.json", "g.csv", "g.tsv", "g.jsonl.gz", "g.parquet"]))
    path = save(scratch / name, content)
    try:
        records = read(path)
    except FeedbackError:
        return
    assert len(records) > 0
    assert all(where.startswith(name) and isinstance(record, dict) for where, record in records)


def test_help_does_not_pay_for_pyarrow_and_datasets():
    code = "import sys, offline_kto.precompute.records.sources; print({'pyarrow', 'datasets', 'torch', 'pandas'} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout == "set()\n"


@pytest.mark.parametrize("form", ["saved", "parquet"])
@pytest.mark.parametrize(
    ("names", "expected"), [(["good", "bad"], ["bad", "good", None]), (["0", "1"], ["1", "0", None])]
)
def test_numbers_of_classes_become_their_names(tmp_path, form, names, expected):
    label = datasets.ClassLabel(names=names)
    features = datasets.Features(
        {"label": label, "raters": datasets.Sequence(label), "meta": {"label": label}, "n": datasets.Value("int64")}
    )
    rows = [{"label": one, "raters": [one, one], "meta": {"label": one}, "n": one} for one in (1, 0, -1)]
    data = datasets.Dataset.from_list(rows, features=features)
    path = tmp_path / ("saved" if form == "saved" else "f.parquet")
    if form == "saved":
        data.save_to_disk(str(path))
    else:
        data.to_parquet(str(path))
    records = [record for _, record in read(path)]
    assert [one["label"] for one in records] == expected
    assert [one["raters"] for one in records] == [[one, one] for one in expected]
    assert [one["meta"]["label"] for one in records] == expected
    assert [one["n"] for one in records] == [1, 0, -1]


@pytest.mark.parametrize("metadata", [b"{", b"[]", b"{}", b'{"info": {"features": []}}', b'{"info": 3}'])
def test_metadata_of_another_kind_names_no_classes(tmp_path, metadata):
    table = pa.table({"label": [1, 0]}).replace_schema_metadata({"huggingface": metadata})
    pq.write_table(table, tmp_path / "f.parquet")
    assert [record["label"] for _, record in read(tmp_path / "f.parquet")] == [1, 0]


@pytest.mark.parametrize(("stored", "expected"), [("4", 4), ("4.5", 4.5), ("-1.00", -1)])
def test_decimals_are_numbers(tmp_path, stored, expected):
    column = pa.array([decimal.Decimal(stored)], pa.decimal128(5, 2))
    pq.write_table(pa.table({"label": column, "in": pa.array([[decimal.Decimal(stored)]])}), tmp_path / "f.parquet")
    ((_, record),) = read(tmp_path / "f.parquet")
    assert record == {"label": expected, "in": [expected]}
    assert type(record["label"]) is type(expected)


@pytest.mark.parametrize("name", ["f.jsonl", "f.csv", "f.parquet", "data/f.jsonl"])
def test_classes_that_dataset_infos_describes_have_their_names(tmp_path, name):
    label = {"num_classes": 2, "names": ["good", "bad"], "id": None, "_type": "ClassLabel"}
    other = {**label, "names": ["a", "b"]}
    infos = {
        "default": {"features": {"label": label, "kind": label}, "splits": {}},
        "other": {"features": {"label": {**label, "id": 3}, "kind": other}},
    }
    (tmp_path / "dataset_infos.json").write_text(json.dumps(infos))
    (tmp_path / "data").mkdir()
    rows = [{"label": 1, "kind": 1, "n": 1}, {"label": 0, "kind": 0, "n": 0}]
    path = tmp_path / name
    if name.endswith("csv"):
        path.write_text("label,kind,n\n1,1,1\n0,0,0\n")
    elif name.endswith("parquet"):
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    records = [record for _, record in read(path)]
    assert [one["label"] for one in records] == ["bad", "good"]
    # Two configurations name them differently, so the numbers must not be read as labels.
    assert [one["kind"] for one in records] == ["class 1 (of unknown name)", "class 0 (of unknown name)"]
    assert [int(one["n"]) for one in records] == [1, 0]


def test_names_and_numbers_of_classes_may_be_mixed(tmp_path):
    label = {"names": ["good", "bad"], "_type": "ClassLabel"}
    (tmp_path / "dataset_info.json").write_text(json.dumps({"features": {"label": label}}))
    (tmp_path / "f.jsonl").write_text('{"label": "bad"}\n{"label": -1}\n{"label": true}\n{"label": 7}\n')
    assert [record["label"] for _, record in read(tmp_path / "f.jsonl")] == [
        *("bad", None, True, "class 7 (of unknown name)")
    ]


_LABEL = {"_type": "ClassLabel", "names": ["good", "bad"]}
_CARD = """---
license: mit
dataset_info:
  features:
  - name: label
    dtype:
      class_label:
        names:
          '1': bad
          '0': good
  - {name: raters, sequence: {class_label: {names: {0: good, 1: bad}}}}
  - {name: meta, struct: [{name: label, dtype: {class_label: {names: [good, bad]}}}, {name: x, dtype: string}]}
  - name: turns
    list:
    - {name: label, dtype: {class_label: {names: {'0': good, '1': bad}}}}
---
# A data set
"""


def _in_card(folder, card=_CARD):
    (folder / "README.md").write_text(card)


def _in_infos(folder):
    lists = [{"_type": "List", "feature": one} for one in (_LABEL, {"label": _LABEL})]
    features = {"label": _LABEL, "raters": lists[0], "meta": {"label": _LABEL}, "turns": lists[1]}
    (folder / "dataset_infos.json").write_text(json.dumps({"default": {"features": features}}))


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("name", ["f.jsonl", "train.parquet", "data/train.jsonl", "data/en/train.jsonl"])
@pytest.mark.parametrize("describe", [_in_card, _in_infos, lambda folder: (_in_card(folder), _in_infos(folder))])
def test_names_of_classes_are_found_beside_the_files(tmp_path, describe, name, whole):
    rows = [{"label": n, "raters": [n, 1], "meta": {"label": n}, "turns": [{"label": n}], "n": n} for n in (1, 0)]
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    if name.endswith("parquet"):
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    describe(tmp_path)
    records = [record for _, record in read(tmp_path if whole else path)]
    assert records == [
        {"label": one, "raters": [one, "bad"], "meta": {"label": one}, "turns": [{"label": one}], "n": n}
        for one, n in (("bad", 1), ("good", 0))
    ]


@pytest.mark.parametrize(
    "card",
    [
        _CARD.replace("'0': good", "'2': good"),
        _CARD.replace("        names:\n          '1': bad\n          '0': good\n", "        num_classes: 2\n"),
        "---\ndataset_info:\n"
        + "".join(
            f"- config_name: {name}\n  features:\n  - {{name: label, dtype: {{class_label: {{names: [{names}]}}}}}}\n"
            for name, names in (("a", "good, bad"), ("b", "bad, good"), ("c", "good, bad"))
        )
        + "---\n",
    ],
    ids=["a gap", "no names", "two configurations"],
)
def test_a_number_of_a_class_without_a_name_is_no_label(tmp_path, card):
    _in_card(tmp_path, card)
    (tmp_path / "f.jsonl").write_text('{"label": 0}\n')
    assert [record["label"] for _, record in read(tmp_path / "f.jsonl")] == ["class 0 (of unknown name)"]


def test_a_card_that_describes_classes_must_be_readable(tmp_path):
    (tmp_path / "f.jsonl").write_text('{"label": 0}\n')
    _in_card(tmp_path, "---\nlicense: [\n---\n")
    assert [record["label"] for _, record in read(tmp_path / "f.jsonl")] == [0]
    _in_card(tmp_path, "---\ndataset_info: [class_label\n---\n")
    with pytest.raises(KTOError, match=r"README.md:\d: not valid YAML"):
        [*read(tmp_path / "f.jsonl")]


@pytest.mark.parametrize("text", ["{", "[]", "3", '{"features": []}', '{"a": {"features": {"label": 1}}}', '{"a": 3}'])
def test_infos_of_another_program_name_no_classes(tmp_path, text):
    (tmp_path / "dataset_infos.json").write_text(text)
    (tmp_path / "f.jsonl").write_text('{"label": 1}\n')
    assert [record["label"] for _, record in read(tmp_path / "f.jsonl")] == [1]
