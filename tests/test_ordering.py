"""Numbers and times are put in their own order, however they are written."""

import pytest

from offline_kto.kto_core.errors import FeedbackError
from offline_kto.kto_core.feedback.ordering import in_order
from offline_kto.kto_core.feedback.paths import Path

# Values, the first of which comes first.
ORDERED = [
    [9, 10],
    ["9", "10"],
    [9, "10.5"],
    ["-2", "1e3"],
    [999, 1736409600],
    ["1/9/2026 9:00", "1/9/2026 10:00"],
    ["1/9/2026 9:00", "1/10/2026 9:00"],
    ["25.12.2025 10:00", "1.1.2026 9:00"],
    ["2026-01-01 9:59:00", "2026-01-01 10:01:00"],
    ["2026-01-01T23:00:00Z", "2026-01-01T23:00:00.5Z"],
    ["2026-01-02T00:30:00+02:00", "2026-01-01T23:00:00Z"],
    ["Jan 9, 2026 9:00 AM", "Jan 9, 2026 10:00 AM"],
    ["Fri Jan 09 2026 10:00:00 GMT+0100 (CET)", "Thu Jan 15 2026 10:00:00 GMT+0100 (CET)"],
    ["Fri Jan 09 2026 11:00:00 GMT+0200", "Fri Jan 09 2026 10:30:00 GMT+0100"],
    ['{"$date":"2026-01-01T00:00:00Z"}', '{"$date":"2026-01-01T00:00:00.1Z"}'],
    [{"$date": {"$numberLong": "999"}}, {"$date": {"$numberLong": "1000"}}],
    ["a", "b"],
    ["01HX9", "01HXA"],
]
REFUSED = [
    (["9", "ten"], ['"9"', '"ten"', "Write all in one form"]),
    ([None, 2], ["null", "Write all in one form"]),
    ([[1], "a"], ["[1]", "no place in an order"]),
    (["1736409600", "2026-01-01T00:00:00Z"], ["1736409600", "2026-01-01", "Write all in one form"]),
    (["2026-01-01T00:00:00", "2026-01-01T00:00:00Z"], ["offset", "Write all in one form"]),
    (["1/31/2026 9:00", "2/1/2026 9:00"], ['"2/1/2026 9:00"', "two dates", "2026-01-31T09:00:00"]),
    (["9:59", "10:01"], ['"9:59"', "not a time"]),
    (["gestern 9:59", "heute 10:01"], ['"gestern 9:59"', "not a time"]),
    (["turn 9", "turn 10"], ['"turn 9"', "different lengths"]),
]


@pytest.mark.parametrize("values", ORDERED, ids=str)
def test_values_have_their_own_order(values: list[object]) -> None:
    first, second = in_order(values)
    assert first < second
    record = {"list": [{"at": values[1]}, {"at": values[0]}]}
    at = [one["at"] for one in Path("sort_by(list, &at)", "here").find(record, "f:1")]
    assert at == values
    assert Path("min_by(list, &at).at == list[1].at && max_by(list, &at).at == list[0].at", "here").find(record, "f:1")


@pytest.mark.parametrize(("values", "words"), REFUSED, ids=str)
def test_values_without_an_order_are_refused(values: list[object], words: list[str]) -> None:
    with pytest.raises(FeedbackError) as caught:
        Path("sort_by(list, &at)", "a mapping: messages").find({"list": [{"at": one} for one in values]}, "f:1")
    assert [word for word in ("f:1", '"list"', 'by "at"', *words) if word not in str(caught.value)] == []


def test_numbers_that_are_text_are_compared_as_numbers() -> None:
    record = {"a": "10", "b": "9", "none": None, "word": "ten"}
    assert Path("a > b && b < a && a >= '9.5'", "here").find(record, "f:1") is True
    assert Path("none > b", "here").find(record, "f:1") is None
    with pytest.raises(FeedbackError, match="ten"):
        Path("word > a", "here").find(record, "f:1")


def test_lists_of_one_value_and_of_none_need_no_order() -> None:
    assert Path("sort_by(list, &at)", "here").find({"list": [{"at": None}]}, "f:1") == [{"at": None}]
    assert Path("max_by(list, &at)", "here").find({"list": []}, "f:1") is None
