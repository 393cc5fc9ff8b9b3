"""Every kind of judgement becomes the masses of its row, in any container, by columns, options and mappings."""

import csv
import gc
import json
import math
import re
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from offline_kto.kto_core.errors import ConfigError, KTOError
from offline_kto.kto_core.feedback.judging import judge
from offline_kto.kto_core.feedback.labels import UNANIMOUS, LabelRule
from offline_kto.kto_core.feedback.records import FeedbackRow
from offline_kto.precompute.config import PrecomputeConfig
from offline_kto.precompute.feedback.rows import Feedback

ASKED = {"prompt": "q", "completion": "a"}
THIRD = 1 / 3


def as_jsonl(folder: Path, records: list[dict[str, Any]]) -> Path:
    path = folder / "f.jsonl"
    path.write_text("".join(json.dumps(one) + "\n" for one in records), encoding="utf-8")
    return path


def as_csv(folder: Path, records: list[dict[str, Any]]) -> Path:
    path = folder / "f.csv"
    names = list(dict.fromkeys(name for one in records for name in one))
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        for one in records:
            writer.writerow({k: json.dumps(v) if isinstance(v, list | dict) else v for k, v in one.items()})
    return path


def as_parquet(folder: Path, records: list[dict[str, Any]]) -> Path:
    pq.write_table(pa.Table.from_pylist(records), folder / "f.parquet")
    return folder / "f.parquet"


CONTAINERS = [as_jsonl, as_csv, as_parquet]


def feedback(path: Path, **options: Any) -> tuple[list[FeedbackRow], Feedback]:
    read = Feedback(PrecomputeConfig(model="m", data=str(path), one_class=True, **options), has_template=False)
    rows = []
    for one in read.rows():
        read.keep(one)
        rows.append(one)
    read.finish()
    return rows, read


def masses(path: Path, **options: Any) -> list[tuple[float, float]]:
    return [(one.desirable_mass, one.undesirable_mass) for one in feedback(path, **options)[0]]


def left_out(path: Path, **options: Any) -> dict[str, int]:
    return dict(feedback(path, **options)[1].found.left_out.counts)


def refusal(path: Path, **options: Any) -> str:
    with pytest.raises(KTOError) as caught:
        feedback(path, **options)
    return str(caught.value)


def rows_of(*values: dict[str, Any]) -> list[dict[str, Any]]:
    return [{**ASKED, **one} for one in values]


# One bit


def test_one_bit_has_the_mass_of_its_label_and_no_judgement_of_its_own(tmp_path: Path) -> None:
    rows, _ = feedback(as_jsonl(tmp_path, rows_of({"label": True}, {"label": "down"}, {"label": [True, 1, None]})))
    assert [(one.label, one.desirable_mass, one.undesirable_mass) for one in rows] == [
        (True, 1.0, 0.0),
        (False, 0.0, 1.0),
        (True, 1.0, 0.0),
    ]
    assert [one.reading is None for one in rows] == [True, True, False]  # the last has votes


# Votes


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("names", [("up", "down"), ("upvotes", "downvotes"), ("votes_up", "votes_down")])
def test_numbers_of_votes(tmp_path: Path, container: Any, names: tuple[str, str]) -> None:
    votes = [(2, 1), (0, 4), (3, 0), (1, 1)]
    path = container(tmp_path, rows_of(*(dict(zip(names, one, strict=True)) for one in votes)))
    assert masses(path) == [(2 / 3, 1 / 3), (0, 1), (1, 0), (0.5, 0.5)]
    assert masses(path, votes="count") == votes
    assert [one.label for one in feedback(path)[0]] == [True, False, True, True]
    assert left_out(path, votes="unanimous") == {"raters disagree": 2}
    assert feedback(path)[1].unused_columns() == []


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("name", ["label", "labels"])
def test_labels_of_several_raters(tmp_path: Path, container: Any, name: str) -> None:
    labels = [["up", "down", "up"], ["bad", "down", "bad"], ["good", None, "no"]]
    path = container(tmp_path, rows_of(*({name: one} for one in labels)))
    assert masses(path) == [(2 / 3, 1 / 3), (0, 1), (0.5, 0.5)]
    assert masses(path, votes="count") == [(2, 1), (0, 3), (1, 1)]
    assert masses(path, votes="unanimous") == [(0, 1)]


def test_raters_of_the_only_answer_of_a_conversation(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    path = as_jsonl(tmp_path, [{"messages": turns, "labels": [True, False, True]}])
    assert masses(path) == [(2 / 3, 1 / 3)]
    # Of two answers, a list has the label of each, as before.
    more = [*turns, *turns]
    path = as_jsonl(tmp_path, [{"messages": more, "labels": [True, False]}])
    assert masses(path) == [(1, 0), (0, 1)]
    assert "3 'labels' for 2 answers" in refusal(as_jsonl(tmp_path, [{"messages": more, "labels": [1, 0, 1]}]))


def test_rows_without_votes_are_unrated(tmp_path: Path) -> None:
    path = as_jsonl(
        tmp_path, rows_of({"up": 0, "down": 0}, {"up": None, "down": None}, {"labels": []}, {"labels": [None]})
    )
    assert "unrated: 4" in refusal(path)


@pytest.mark.parametrize(
    ("votes", "part"),
    [
        ({"up": 1.5, "down": 2}, "'up' is 1.5"),
        ({"up": 1e300, "down": 2}, "'up' is 1e+300"),
        ({"up": -1, "down": 2}, "'up' is -1"),
        ({"up": 3, "down": None}, "'down' is null"),
        ({"up": "many", "down": 2}, "'up' is \"many\""),
        ({"up": math.inf, "down": 2}, "'up' is Infinity"),
        ({"up": True, "down": 2}, "'up' is true"),
    ],
)
def test_a_number_of_votes_that_is_none_is_refused_with_its_place(
    tmp_path: Path, votes: dict[str, Any], part: str
) -> None:
    path = as_jsonl(tmp_path, rows_of({"up": 1, "down": 0}, votes))
    message = refusal(path)
    assert f"f.jsonl:2: {part}" in message
    assert "Write a whole number of votes" in message
    assert left_out(path, on_bad_row="skip") == {"defective": 1}


def test_a_label_beside_votes_must_agree_with_them(tmp_path: Path) -> None:
    agreed = rows_of(
        {"label": True, "up": 2, "down": 1}, {"label": False, "up": 1, "down": 1}, {"label": "", "up": 0, "down": 2}
    )
    assert masses(as_jsonl(tmp_path, agreed)) == [(2 / 3, 1 / 3), (0.5, 0.5), (0, 1)]
    message = refusal(as_jsonl(tmp_path, rows_of({"label": True, "up": 1, "down": 2})))
    assert "f.jsonl:1: 'label' says that the answer is desirable, and 'up' and 'down' that it is not" in message
    # An option names the column to read.
    path = as_jsonl(tmp_path, rows_of({"label": True, "up": 1, "down": 2}))
    assert masses(path, label_field="label") == [(1, 0)]


def test_one_column_of_votes_is_no_label(tmp_path: Path) -> None:
    assert masses(as_jsonl(tmp_path, rows_of({"up": 3, "label": False}))) == [(0, 1)]


# Ratings


@pytest.mark.parametrize("container", CONTAINERS)
def test_a_rating_is_a_share_of_its_scale(tmp_path: Path, container: Any) -> None:
    path = container(tmp_path, rows_of(*({"rating": one} for one in (1, 2, 3, 4.5, 5))))
    assert masses(path, rating_scale="1:5") == [(0, 1), (0.25, 0.75), (0.5, 0.5), (0.875, 0.125), (1, 0)]


def test_ratings_of_several_raters_and_of_other_columns(tmp_path: Path) -> None:
    path = as_jsonl(tmp_path, rows_of({"stars": [1, 5, 4]}, {"stars": "3"}, {"stars": None}))
    assert masses(path, label_field="stars", rating_scale="1:5") == [
        (pytest.approx(1.75 / 3), pytest.approx(1.25 / 3)),
        (0.5, 0.5),
    ]
    assert masses(path, label_field="stars", rating_scale="1:5", votes="count")[0] == (1.75, 1.25)


def test_ratings_that_are_not_on_the_scale_are_reported_together(tmp_path: Path) -> None:
    path = as_jsonl(tmp_path, rows_of({"rating": 4}, {"rating": 6}, {"rating": 0.5}, {"rating": 3}))
    message = refusal(path, rating_scale="1:5")
    assert "f.jsonl:2: 'rating' is 6, which is not on the scale from 1 to 5" in message
    assert "f.jsonl:3: 'rating' is 0.5" in message
    assert left_out(path, rating_scale="1:5", on_bad_row="skip") == {"defective": 2}
    words = as_jsonl(tmp_path, rows_of({"rating": 4}, {"rating": "good"}))
    assert "f.jsonl:2: 'rating' is \"good\", which is no number from 1 to 5" in refusal(words, rating_scale="1:5")


@pytest.mark.parametrize("scale", ["5", "5:1", "1:1", "a:b", "1:2:3", "nan:1", ""])
def test_a_scale_that_is_none(scale: str) -> None:
    with pytest.raises(ConfigError, match="--rating-scale must be the lowest and the highest rating, like 1:5"):
        PrecomputeConfig(model="m", data="d", rating_scale=scale)


def test_a_scale_excludes_other_rules(tmp_path: Path) -> None:
    path = as_jsonl(tmp_path, rows_of({"rating": 4}))
    assert "--rating-scale excludes --up and --down" in refusal(path, rating_scale="1:5", up=">=4", down="<=2")
    assert "--rating-scale excludes --rating-threshold" in refusal(path, rating_scale="1:5", rating_threshold="4")


# Objectives


@pytest.mark.parametrize("container", CONTAINERS)
def test_a_label_for_each_objective(tmp_path: Path, container: Any) -> None:
    labels = [
        {"helpful": True, "harmless": False},
        {"helpful": False, "harmless": None},
        {"helpful": None, "harmless": None},
    ]
    rows, read = feedback(container(tmp_path, rows_of(*({"labels": one} for one in labels))))
    assert [dict(one.objectives) for one in rows] == [
        {"helpful": (1, 0), "harmless": (0, 1)},
        {"helpful": (0, 1)},
    ]
    assert [(one.label, one.desirable_mass, one.undesirable_mass) for one in rows] == [(True, 1, 1), (False, 0, 1)]
    assert read.found.left_out.counts == {"unrated": 1}
    assert read.unused_columns() == []


def test_objectives_may_have_votes_ratings_and_a_label_for_the_whole_row(tmp_path: Path) -> None:
    labels = {"helpful": [True, False, True], "harmless": {"up": 1, "down": 3}}
    (row,), _ = feedback(as_jsonl(tmp_path, rows_of({"labels": labels, "label": False})))
    assert row.objectives == {"helpful": (2 / 3, 1 / 3), "harmless": (0.25, 0.75)}
    assert (row.label, row.desirable_mass, row.undesirable_mass) == (False, 0, 1)
    path = as_jsonl(tmp_path, rows_of({"labels": {"helpful": 4, "correct": 1}}))
    (row,), _ = feedback(path, rating_scale="0:4")
    assert row.objectives == {"helpful": (1, 0), "correct": (0.25, 0.75)}
    (row,), _ = feedback(path, label_field="labels", up=">=3", down="<=1")
    assert row.objectives == {"helpful": (1, 0), "correct": (0, 1)}


def test_objectives_from_several_columns(tmp_path: Path) -> None:
    path = as_csv(tmp_path, rows_of({"helpfulness": 4, "correct ness": 1, "other": 2}))
    (row,), read = feedback(path, label_field='{help: helpfulness, correct: "correct ness"}', rating_scale="0:4")
    assert row.objectives == {"help": (1, 0), "correct": (0.25, 0.75)}
    assert read.unused_columns() == ["other"]


@pytest.mark.parametrize("name", ["a=b", "a,b", "", " a", "a\n", "x" * 300])
def test_names_of_objectives_that_no_option_could_name(tmp_path: Path, name: str) -> None:
    message = refusal(as_jsonl(tmp_path, rows_of({"labels": {name: True}})))
    assert message.startswith("f.jsonl:1: ")
    assert "cannot be the name of an objective" in message


def test_unknown_labels_of_objectives_are_listed_with_their_values(tmp_path: Path) -> None:
    message = refusal(as_jsonl(tmp_path, rows_of({"labels": {"a": 4, "b": 2}}, {"labels": {"a": 5, "b": 1}})))
    assert "f.jsonl:1: 'labels.a' is 4, which is neither up nor down. 'labels' has" in message
    options = re.search(r"pass (--label-field labels )?--up '(\S+)' --down '(\S+)'", message)
    assert options is not None
    (first, _), _ = feedback(tmp_path / "f.jsonl", label_field="labels", up=options[2], down=options[3])
    assert first.objectives == {"a": (1, 0), "b": (0, 1)}


def test_an_object_of_labels_is_read_where_it_is_named_only(tmp_path: Path) -> None:
    path = as_jsonl(tmp_path, rows_of({"label": {"helpful": True}}))
    assert "'label' is {\"helpful\": true}, an object. If one of its values is the label" in refusal(path)
    assert "name it: --label-field label.helpful. Write" in refusal(path)
    assert feedback(path, label_field="label")[0][0].objectives == {"helpful": (1, 0)}


@pytest.mark.parametrize(
    ("label", "key"),
    [
        ({"rating": "up"}, "rating"),
        ({"by": "me", "thumbs": 1}, "thumbs"),
        ({"by": "me", "is_fine": "yes"}, "is_fine"),
        ({"a": "yes", "b": "no"}, "KEY"),
        ({"a b": "yes"}, "KEY"),
    ],
)
def test_a_label_that_is_an_object_says_how_to_name_its_value(tmp_path: Path, label: object, key: str) -> None:
    message = refusal(as_jsonl(tmp_path, rows_of({"label": label})))
    assert f"name it: --label-field label.{key}. Write" in message
    if key != "KEY":
        path = as_jsonl(tmp_path, rows_of({"label": label}))
        assert [row.label for row in feedback(path, label_field=f"label.{key}")[0]] == [True]


# Weights


@pytest.mark.parametrize("container", CONTAINERS)
def test_weights(tmp_path: Path, container: Any) -> None:
    path = container(
        tmp_path, rows_of({"label": 1, "weight": 2}, {"label": 0, "weight": 0.5}, {"label": 1, "weight": 0})
    )
    rows, read = feedback(path)
    assert [one.weight for one in rows] == [2, 0.5]
    assert read.found.left_out.counts == {"weight 0": 1}
    assert read.unused_columns() == []


def test_a_weight_at_a_path(tmp_path: Path) -> None:
    path = as_jsonl(tmp_path, rows_of({"label": True, "meta": {"confidence": "0.25"}}))
    assert [one.weight for one in feedback(path, weight_field="meta.confidence")[0]] == [0.25]


@pytest.mark.parametrize("weight", [-1, math.nan, math.inf, "heavy", True, None, [1], 1e300])
def test_a_weight_that_is_none_is_refused_with_its_place(tmp_path: Path, weight: Any) -> None:
    path = as_jsonl(tmp_path, rows_of({"label": 1, "weight": 1}, {"label": 0, "weight": weight}))
    message = refusal(path)
    assert "f.jsonl:2: 'weight' is " in message
    assert "A weight is a finite number of at least 0" in message
    assert left_out(path, on_bad_row="skip") == {"defective": 1}


def test_both_rows_of_a_pair_and_all_judged_turns_have_the_weight_of_their_record(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}] * 2
    records = [
        {"prompt": "q", "chosen": "a", "rejected": "b", "weight": 3},
        {"messages": turns, "labels": [1, 0], "weight": 2},
    ]
    assert [one.weight for one in feedback(as_jsonl(tmp_path, records))[0]] == [3, 3, 2, 2]


# Mappings


def mapped(tmp_path: Path, text: str, records: list[dict[str, Any]], **options: Any) -> list[FeedbackRow]:
    (tmp_path / "m.yaml").write_text(text, encoding="utf-8")
    return feedback(as_jsonl(tmp_path, records), map=str(tmp_path / "m.yaml"), **options)[0]


RECORD = {"in": "q", "out": "a", "v": {"yes": 3, "no": 1}, "r": {"help": 2, "safe": "bad"}, "w": 5, "all": [1, 0]}


@pytest.mark.parametrize(
    ("lines", "expected", "objectives"),
    [
        ("votes: {up: v.yes, down: v.no}", (0.75, 0.25), {}),
        ("votes: all", (0.5, 0.5), {}),
        ("label: all", (0.5, 0.5), {}),
        ("label: {path: r.help, rating-scale: [0, 4]}", (0.5, 0.5), {}),
        (
            "labels: {help: {path: r.help, rating-scale: [0, 4]}, safe: r.safe}",
            (0.5, 1.5),
            {"help": (0.5, 0.5), "safe": (0, 1)},
        ),
        (
            "labels: {votes: {up: v.yes, down: v.no}, none: nothing}",
            (0.75, 0.25),
            {"votes": (0.75, 0.25)},
        ),
    ],
)
def test_keys_of_mappings(
    tmp_path: Path, lines: str, expected: tuple[float, float], objectives: dict[str, tuple[float, float]]
) -> None:
    (row,) = mapped(tmp_path, f"prompt: in\ncompletion: out\nweight: w\n{lines}\n", [RECORD])
    assert (row.desirable_mass, row.undesirable_mass) == expected
    assert (row.objectives, row.weight) == (objectives, 5)


@pytest.mark.parametrize(
    ("lines", "part"),
    [
        ("votes: {up: v.yes}", "give up and down"),
        ("votes: all\nlabel: all", "label and votes exclude each other"),
        ("labels: {}", "the label of each objective"),
        ("labels: {'a=b': all}", "cannot be the name of an objective"),
        ("label: {path: r.help, rating-scale: [4, 0]}", "rating-scale"),
        ("label: {path: r.help, rating-scale: [0, 4], up: ['>=3']}", "without up, down and scale"),
    ],
)
def test_keys_of_mappings_that_make_no_sense(tmp_path: Path, lines: str, part: str) -> None:
    with pytest.raises(ConfigError, match=part):
        mapped(tmp_path, f"prompt: in\ncompletion: out\n{lines}\n", [RECORD])


def test_options_change_the_votes_and_the_weight_of_a_mapping(tmp_path: Path) -> None:
    text = "prompt: in\ncompletion: out\nvotes: {up: v.yes, down: v.no}\n"
    (row,) = mapped(tmp_path, text, [RECORD], votes="count", weight_field="r.help")
    assert (row.desirable_mass, row.undesirable_mass, row.weight) == (3, 1, 2)


def test_a_bad_weight_of_a_mapping_names_its_path(tmp_path: Path) -> None:
    with pytest.raises(KTOError, match=r"f.jsonl:1: 'r.safe' is \"bad\". A weight is"):
        mapped(tmp_path, "prompt: in\ncompletion: out\nlabel: all\nweight: r.safe\n", [RECORD])


# Exports of tools and data sets


def test_responses_of_several_annotators_of_argilla(tmp_path: Path) -> None:
    def response(*values: Any) -> list[dict[str, Any]]:
        return [{"value": one, "status": "submitted", "user_id": str(i)} for i, one in enumerate(values)]

    record = {
        "fields": {"prompt": "q", "response": "a"},
        "responses": {"helpful": response("yes", "no", "yes"), "honest": response("yes", "yes")},
        "status": "completed",
    }
    path = as_jsonl(tmp_path, [record])
    assert "several objectives with --label-field NAME,NAME" in refusal(path)
    assert masses(path, label_field="helpful") == [(2 / 3, 1 / 3)]
    (row,), read = feedback(path, label_field="helpful,honest")
    assert row.objectives == {"helpful": (2 / 3, 1 / 3), "honest": (1, 0)}
    assert read.unused_columns() == []
    assert 'no record has a score "honst"' in refusal(path, label_field="helpful,honst")


def test_annotations_of_label_studio(tmp_path: Path) -> None:
    def annotation(**values: Any) -> dict[str, Any]:
        kinds = {"thumb": "choices", "stars": "rating"}
        result = [{"from_name": name, "type": kinds[name], "value": {kinds[name]: one}} for name, one in values.items()]
        return {"result": result, "was_cancelled": False}

    task = {"data": {"prompt": "q", "response": "a"}}
    records = [
        {**task, "annotations": [annotation(thumb=["up"]), annotation(thumb=["down"]), annotation(thumb=["up"])]}
    ]
    assert masses(as_jsonl(tmp_path, records)) == [(2 / 3, 1 / 3)]
    records = [{**task, "annotations": [annotation(stars=5), annotation(stars=2)]}]
    assert masses(as_jsonl(tmp_path, records), rating_scale="1:5") == [(0.625, 0.375)]


def test_ratings_of_helpsteer_by_aspect(tmp_path: Path) -> None:
    record = {
        "prompt": "q",
        "response": "a",
        "helpfulness": 3,
        "correctness": 4,
        "coherence": 4,
        "complexity": 1,
        "verbosity": 0,
    }
    path = as_jsonl(tmp_path, [record])
    assert masses(path, rating_scale="0:4") == [(0.75, 0.25)]
    fields = "{helpfulness: helpfulness, correctness: correctness}"
    (row,), _ = feedback(path, label_field=fields, rating_scale="0:4")
    assert row.objectives == {"helpfulness": (0.75, 0.25), "correctness": (1, 0)}


def test_ratings_of_ultrafeedback_by_aspect(tmp_path: Path) -> None:
    def completion(help_: str, honest: str) -> dict[str, Any]:
        ratings = {"helpfulness": {"Rating": help_}, "honesty": {"Rating": honest}}
        return {"response": f"a{help_}", "overall_score": 7, "annotations": ratings}

    path = as_jsonl(tmp_path, [{"instruction": "q", "completions": [completion("5", "4"), completion("1", "N/A")]}])
    fields = "item.annotations.{helpful: helpfulness.Rating, honest: honesty.Rating}"
    rows, _ = feedback(path, label_field=fields, rating_scale="1:5")
    assert [one.objectives for one in rows] == [
        {"helpful": (1, 0), "honest": (0.75, 0.25)},
        {"helpful": (0, 1)},
    ]


def test_votes_of_a_question_and_answer_site(tmp_path: Path) -> None:
    record = {
        "title": "q",
        "answers": [
            {"body": "a", "up_vote_count": 9, "down_vote_count": 1},
            {"body": "b", "up_vote_count": 0, "down_vote_count": 0},
        ],
    }
    text = "prompt: title\neach: answers\ncompletion: item.body\nvotes: {up: item.up_vote_count, down: item.down_vote_count}\n"
    (row,) = mapped(tmp_path, text, [record])
    assert (row.completion, row.desirable_mass, row.undesirable_mass) == ("a", 0.9, 0.1)
    # Without a mapping, an option names the two columns.
    path = as_csv(tmp_path, [{"question": "q", "answer": "a", "UpVotes": 3, "DownVotes": 1}])
    assert masses(path, label_field="{up: UpVotes, down: DownVotes}") == [(0.75, 0.25)]


# Split votes, and numbers of votes that are missing


def left_out_file(path: Path, **options: Any) -> list[dict[str, str]]:
    """The lines of `--left-out`."""
    out = path.parent / "left.jsonl"
    feedback(path, left_out=out, **options)[1].write_left_out()
    return [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]


def test_a_split_objective_is_counted_as_what_it_is(tmp_path: Path) -> None:
    labels: list[dict[str, Any]] = [
        {"helpful": [1, 0], "harmless": True},
        {"helpful": [1, 1], "harmless": {"up": 1, "down": 2}},
        {"helpful": [1, 0], "harmless": None},
        {"helpful": None, "harmless": None},
    ]
    path = as_jsonl(tmp_path, rows_of(*({"labels": one} for one in labels)))
    rows, read = feedback(path, votes="unanimous")
    assert [dict(one.objectives) for one in rows] == [{"harmless": (1, 0)}, {"helpful": (1, 0)}]
    assert read.found.not_judged == {("helpful", "raters disagree"): 1, ("harmless", "raters disagree"): 1}
    assert read.found.left_out.counts == {"raters disagree": 1, "unrated": 1}
    assert left_out_file(path, votes="unanimous") == [
        {"where": "f.jsonl:1", "reason": "raters disagree", "objective": "helpful", "detail": "[1, 0]"},
        {"where": "f.jsonl:2", "reason": "raters disagree", "objective": "harmless", "detail": "1 up, 2 down"},
        {
            "where": "f.jsonl:3",
            "reason": "raters disagree",
            "detail": "no objective is judged: helpful, harmless (helpful: raters disagree: [1, 0])",
        },
        {"where": "f.jsonl:4", "reason": "unrated", "detail": "no objective is judged: helpful, harmless"},
    ]


def test_a_row_with_its_own_label_keeps_it_where_all_objectives_are_split(tmp_path: Path) -> None:
    path = as_jsonl(tmp_path, rows_of({"label": True, "labels": {"helpful": [1, 0]}}))
    (row,), read = feedback(path, votes="unanimous")
    assert (row.desirable_mass, row.undesirable_mass, row.objectives) == (1, 0, {})
    assert read.found.not_judged == {("helpful", "raters disagree"): 1}


def test_a_split_objective_of_a_mapping_is_counted(tmp_path: Path) -> None:
    text = "prompt: in\ncompletion: out\nlabels: {one: all, help: {path: r.help, up: [2], down: [1]}}\n"
    (row,) = mapped(tmp_path, text, [RECORD], votes="unanimous")
    assert row.reading is not None
    assert {name: left.reason for name, left in row.reading.left_out.items()} == {"one": "raters disagree"}


@pytest.mark.parametrize(
    ("votes", "missing"), [({"up": 3}, "down"), ({"down": 3}, "up"), ({"label": False, "down": 2}, "up")]
)
def test_a_number_of_votes_without_the_other_is_a_defect_where_others_have_both(
    tmp_path: Path, votes: dict[str, Any], missing: str
) -> None:
    path = as_jsonl(tmp_path, rows_of({"up": 1, "down": 0}, votes))
    given = next(name for name in ("up", "down") if name in votes)
    assert (
        f"f.jsonl:2: '{given}' is {votes[given]}, but '{missing}' is missing. Votes need both numbers: write 0 if there are none."
        in refusal(path)
    )
    if "label" not in votes:
        assert left_out(path, on_bad_row="skip") == {"defective": 1}


def test_a_column_of_votes_that_is_missing_altogether_is_one_message(tmp_path: Path) -> None:
    message = refusal(as_jsonl(tmp_path, rows_of({"up": 3, "dwon": 0}, {"up": 1, "dwon": 2})))
    assert "there is a column 'up', but no record has a 'down', and votes need both. Did you mean 'dwon'?" in message
    path = as_jsonl(tmp_path, rows_of({"up": 3, "label": None}, {"up": 1, "label": True}))
    assert left_out(path) == {"unrated": 1}


@pytest.mark.parametrize("skip", ["error", "skip"])
def test_a_weight_that_no_record_has_is_one_message(tmp_path: Path, skip: str) -> None:
    rows = rows_of(*({"label": True, "confidence": 1, "meta": {"age": 1}} for _ in range(3)))
    path = as_jsonl(tmp_path, rows)
    assert refusal(path, weight_field="confidnce", on_bad_row=skip) == (
        f"{path}: --weight-field: no record has a value at \"confidnce\". Did you mean 'confidence'?"
    )
    nested = refusal(path, weight_field="meta.ages", on_bad_row=skip)
    assert nested.endswith("no record has a value at \"meta.ages\". Did you mean 'age'?")
    some = as_jsonl(tmp_path, [*rows, {**rows[0], "confidence": None}])
    assert "f.jsonl:4: 'confidence' is null" in refusal(some, weight_field="confidence")


def test_a_path_of_votes_that_no_record_has_is_one_message(tmp_path: Path) -> None:
    text = "prompt: in\ncompletion: out\n{}\n"
    records = [{"in": "q", "out": "a", "up": 2, "down": one} for one in (0, 1, 0)]
    for line in ("votes: {up: up, down: dwon}", "labels: {help: {up: up, down: dwon}}"):
        with pytest.raises(KTOError, match=r"down: no record has a value at \"dwon\". Did you mean 'down'\?$"):
            mapped(tmp_path, text.format(line), records)
    with pytest.raises(KTOError, match=r"no record has a value at \"dwon\". Did you mean 'down'\?$"):
        feedback(
            as_jsonl(tmp_path, [{**ASKED, "up": 2, "down": one} for one in (0, 1, 0)]),
            label_field="{up: up, down: dwon}",
        )
    with pytest.raises(KTOError, match=r"weight: no record has a value at \"wight\""):
        mapped(tmp_path, text.format("votes: {up: up, down: down}\nweight: wight"), records)


def test_a_scale_of_the_command_line_over_one_of_the_mapping_is_named(tmp_path: Path) -> None:
    text = "name: stars\nprompt: in\ncompletion: out\nlabel: {path: r.help, rating-scale: [0, 4]}\n"
    with pytest.raises(KTOError) as caught:
        mapped(tmp_path, text, [{**RECORD, "r": {"help": 4}}], rating_scale="0:3")
    assert "not on the scale from 0 to 3 (--rating-scale, in place of 0 to 4 in stars)" in str(caught.value)


@pytest.mark.parametrize("options", [{}, {"label_field": "labels"}])
def test_labels_as_python_prints_them_are_refused_with_the_way_to_write_them(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    path = as_csv(tmp_path, rows_of({"labels": "{'helpful': True, 'harmless': None}"}))
    message = refusal(path, **options)
    assert "'labels' is \"{'helpful': True, 'harmless': None}\", as Python prints it" in message
    assert 'Write JSON: {"helpful": true, "harmless": null} (json.dumps makes it)' in message
    broken = refusal(as_csv(tmp_path, rows_of({"labels": "{'helpful': Tru"})), **options)
    assert "Write JSON (json.dumps makes it), or save the data as JSON Lines." in broken


def test_the_bound_of_a_weight_is_in_the_message(tmp_path: Path) -> None:
    path = as_jsonl(tmp_path, rows_of({"label": 1, "weight": 1e300}))
    assert "A weight is a finite number of at least 0 and at most 9.0072e+15" in refusal(path)


class Record(dict[str, Any]):
    """A dictionary whose end can be observed."""


@pytest.fixture
def no_collector() -> Iterator[None]:
    gc.disable()
    yield
    gc.enable()


def test_why_an_objective_is_not_judged_keeps_no_record_in_memory(no_collector: None) -> None:
    """Free it without the garbage collector, which a plan switches off."""
    labels = Record(helpful=[1, 0], harmless=[1, 1])
    freed = weakref.ref(labels)
    reading = judge(LabelRule(votes=UNANIMOUS), labels, "f:1", "labels")
    del labels
    assert [*reading.left_out] == ["helpful"]
    assert freed() is None


def test_a_row_with_one_number_of_votes_keeps_no_record_in_memory(tmp_path: Path, no_collector: None) -> None:
    _, reader = feedback(as_jsonl(tmp_path, rows_of({"label": 1})))
    record = Record(**ASKED, up=3)
    freed = weakref.ref(record)
    assert not [*reader._rows_of(record, "f:1")]
    del record
    assert freed() is None
