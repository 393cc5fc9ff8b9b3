"""Masses of votes, weights, ratings and objectives in the plan and in the cache, where changing them costs no forward pass."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from feedback_files import chat_rows, write_rows
from models import tiny_tokenizer
from test_precompute import scored

from offline_kto.kto_core.cache.manifest import read_manifest
from offline_kto.kto_core.errors import FeedbackError
from offline_kto.kto_core.options import resolve
from offline_kto.precompute.config import PrecomputeConfig
from offline_kto.precompute.feedback.agreement import Agreement
from offline_kto.precompute.inspect_cache import head, info, verify
from offline_kto.precompute.plan import Plan, make_plan
from offline_kto.precompute.plan_page import describe, warnings
from offline_kto.precompute.run import precompute
from offline_kto.precompute.store import Store

Rows = list[dict[str, Any]]
ROWS = chat_rows(12)


def with_columns(*more: dict[str, Any], rows: Rows = ROWS) -> Rows:
    """The rows with other columns in place of their label, repeated."""
    return [{**one, **more[i % len(more)]} for i, one in enumerate({**row} for row in rows)]


def unlabelled(rows: Rows = ROWS) -> Rows:
    return [{k: v for k, v in one.items() if k != "label"} for one in rows]


def plan_of(path: Path, **options: Any) -> Plan:
    return make_plan(PrecomputeConfig(model="m", data=str(path), **options), tiny_tokenizer())


def planned(tmp_path: Path, rows: Rows, **options: Any) -> list[tuple[float, float]]:
    return [tuple(row.judgement.masses) for row in plan_of(write_rows(tmp_path / "f.jsonl", rows), **options).rows]


def page(tmp_path: Path, rows: Rows, **options: Any) -> str:
    """The printed plan, its lines joined."""
    path = write_rows(tmp_path / "f.jsonl", rows)
    config = PrecomputeConfig(model="m", data=str(path), **options)
    tokenizer = tiny_tokenizer()
    plan = make_plan(config, tokenizer)
    lines = describe(plan, plan.counts(), config, tokenizer)
    assert max(map(len, lines)) <= 100
    return re.sub(r"\s+", " ", " ".join(lines))


# Weights and objectives, over all rows


def test_weights_have_a_mean_of_1_over_the_rows_that_are_kept(tmp_path: Path) -> None:
    rows = with_columns({"weight": 3}, {"weight": 1}, {"weight": 0})
    found = planned(tmp_path, rows)
    assert len(found) == 8
    assert sum(map(sum, found)) == pytest.approx(8)
    assert {sum(one) for one in found} == {1.5, 0.5}
    assert [one[0] > 0 for one in found] == [one["label"] for one in rows if one["weight"]]


def test_equal_weights_change_nothing(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "f.jsonl", with_columns({"weight": 0.1}))
    assert plan_of(path).mass_columns == []


def test_rows_without_a_weight_beside_rows_with_one(tmp_path: Path) -> None:
    rows = [{**one, **({"weight": 2} if i % 3 else {})} for i, one in enumerate(ROWS)]
    with pytest.raises(FeedbackError, match=r"f.jsonl: rows without a weight: 4 of 12 \(first: f.jsonl:1\)"):
        planned(tmp_path, rows)


def test_a_weight_that_is_nothing_beside_the_others(tmp_path: Path) -> None:
    rows = [{**one, "weight": 1e-300 if i == 3 else 1e9} for i, one in enumerate(ROWS)]
    with pytest.raises(FeedbackError, match=r"f.jsonl:4: the weight 1e-300 is nothing beside the mean"):
        planned(tmp_path, rows)


def test_all_rows_have_the_same_objectives_in_the_same_order(tmp_path: Path) -> None:
    rows = with_columns({"labels": {"b": True}}, {"labels": {"a": False, "b": None}}, {"weight": 1}, rows=ROWS)
    path = write_rows(tmp_path / "f.jsonl", [{**one, "weight": 1} for one in rows])
    plan = plan_of(path)
    assert plan.mass_columns == ["desirable_mass", "undesirable_mass", "objectives"]
    assert {tuple(row.judgement.objectives) for row in plan.rows} == {("a", "b")}
    assert dict(plan.rows[0].judgement.objectives) == {"a": (0, 0), "b": (1, 0)}
    assert dict(plan.rows[2].judgement.objectives) == {"a": (0, 0), "b": (0, 0)}


def test_rows_of_one_label_with_mass_of_both_classes_are_no_single_class(tmp_path: Path) -> None:
    rows = with_columns({"up": 3, "down": 1}, {"up": 2, "down": 0}, rows=unlabelled())
    assert len(planned(tmp_path, rows)) == 12
    with pytest.raises(FeedbackError, match="every row is desirable"):
        planned(tmp_path, with_columns({"up": 3, "down": 0}, rows=unlabelled()))


# The plan


def test_the_plan_shows_masses_beside_counts(tmp_path: Path) -> None:
    rows = with_columns({"labels": [1, 1, 1]}, {"labels": [1, 0, 0, 0]}, {"labels": [0, 0, None]}, rows=unlabelled())
    text = page(tmp_path, rows)
    assert "4 desirable, 8 undesirable" in text
    assert "masses 5 desirable, 7 undesirable in total" in text
    alpha = naive_alpha([[1, 1, 1], [1, 0, 0, 0], [0, 0]] * 4)
    assert f"votes 12 rows with 2 to 4 votes, 66.7% unanimous, Krippendorff's alpha {alpha:.2f}" in text
    assert "(--votes share)" in text
    assert "masses 16 desirable, 20 undesirable" in page(tmp_path, rows, votes="count")


def test_the_plan_of_one_bit_says_nothing_of_masses(tmp_path: Path) -> None:
    text = page(tmp_path, ROWS)
    assert not re.search(r"masses|votes|weights|objective ", text)


def test_the_plan_shows_weights_and_objectives(tmp_path: Path) -> None:
    rows = with_columns(
        {"labels": {"a": True, "b": 0}, "weight": 9}, {"labels": {"a": False}, "weight": 1}, rows=unlabelled()
    )
    text = page(tmp_path, rows)
    assert "objective a: 12 of 12 rows judged, 10.8 desirable, 1.2 undesirable" in text
    assert "objective b: 6 of 12 rows judged, 0 desirable, 10.8 undesirable" in text
    assert "weights 0.2 to 1.8 after normalisation to a mean of 1 (as read: mean 5)" in text


def test_the_plan_warns_of_raters_who_agree_little(tmp_path: Path) -> None:
    split = with_columns(
        {"labels": [1, 0]}, {"labels": [0, 1]}, {"labels": [1, 1]}, {"labels": [0, 0]}, rows=unlabelled()
    )
    text = page(tmp_path, split)
    assert "the raters agree little: Krippendorff's alpha is" in text
    assert "--votes unanimous" in text
    agreed = with_columns({"labels": [1, 1]}, {"labels": [0, 0]}, rows=unlabelled())
    assert "agree little" not in page(tmp_path, agreed)


def test_the_plan_warns_of_a_weight_that_dwarfs_the_others(tmp_path: Path) -> None:
    rows = [{**one, "weight": 5000 if i == 7 else 1} for i, one in enumerate(chat_rows(240))]
    plan = plan_of(write_rows(tmp_path / "f.jsonl", rows))
    assert any("the largest weight is 229 times the mean (f.jsonl:8)" in one for one in warnings(plan, plan.counts()))
    rows = [{**one, "weight": 50 if i == 7 else 1} for i, one in enumerate(chat_rows(240))]
    plan = plan_of(write_rows(tmp_path / "f.jsonl", rows))
    assert not any("largest weight" in one for one in warnings(plan, plan.counts()))


# Agreement


def naive_alpha(units: list[list[float]]) -> float:
    """Krippendorff's alpha by its definition: observed by expected disagreement over pairs of values."""
    units = [one for one in units if len(one) > 1]
    values = [value for one in units for value in one]
    n = len(values)
    observed = sum(sum((a - b) ** 2 for a in one for b in one) / (len(one) - 1) for one in units)
    expected = sum((a - b) ** 2 for a in values for b in values) / (n - 1)
    return 1 - observed / expected


@pytest.mark.parametrize(
    "units",
    [
        [[1, 1, 0], [0, 0], [1, 1], [0, 1], [1]],
        [[1, 0]] * 5 + [[0, 0, 0]],
        [[0.25, 0.5], [1, 1, 0.75], [0, 0.25], [0.5]],
    ],
)
def test_alpha_is_that_of_the_definition(units: list[list[float]]) -> None:
    agreement = Agreement()
    for one in units:
        agreement.add(tuple((value, one.count(value)) for value in dict.fromkeys(one)))
    assert agreement.alpha() == pytest.approx(naive_alpha(units), abs=1e-12)


def test_alpha_of_votes_that_are_all_the_same_is_not_defined() -> None:
    agreement = Agreement()
    for _ in range(3):
        agreement.add(((1.0, 3),))
    assert (agreement.alpha(), agreement.unanimous, agreement.several) == (None, 3, 3)


# The cache


JUDGED = {
    "votes": ([{"up": 2, "down": 1}, {"up": 0, "down": 3}], {}, {"votes": "share"}),
    "counts": ([{"up": 2, "down": 1}, {"up": 0, "down": 3}], {"votes": "count"}, {"votes": "count"}),
    "ratings": ([{"rating": 5}, {"rating": 2}], {"rating_scale": "1:5"}, {"rating_scale": [1.0, 5.0]}),
    "weights": ([{"label": 1, "weight": 1}, {"label": 0, "weight": 3}], {}, {"weights": True}),
    "objectives": (
        [{"labels": {"a": True, "b": False}}, {"labels": {"b": True}}, {"labels": {"a": False}}],
        {},
        {"objectives": ["a", "b"]},
    ),
}


def config_of(model: Path, data: Path, out: Path, **options: Any) -> PrecomputeConfig:
    return PrecomputeConfig(model=str(model), data=str(data), out=out, device="cpu", rows_per_shard=5, **options)


@pytest.mark.parametrize("kind", JUDGED)
def test_judgements_are_in_the_cache_and_changing_them_costs_no_forward_pass(
    kind: str,
    base: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    columns, options, section = JUDGED[kind]
    data, out = write_rows(tmp_path / "f.jsonl", ROWS), tmp_path / "refs"
    precompute(config_of(base, data, out))
    plain = {path.name: path.read_bytes() for path in (out / "train").iterdir()}
    mark = read_manifest(out).fingerprint
    assert read_manifest(out).run["scored_sequences"] > 0
    write_rows(data, with_columns(*columns, rows=unlabelled()))
    precompute(config_of(base, data, out, **options))
    manifest = read_manifest(out)
    assert (manifest.run["scored_sequences"], manifest.fingerprint) == (0, mark)
    assert manifest.judgements == section
    expected = plan_of(data, **options)
    found = scored(out)
    assert [(row["desirable_mass"], row["undesirable_mass"]) for row in found] == [
        tuple(row.judgement.masses) for row in expected.rows
    ]
    if kind == "objectives":
        assert found[0]["objectives"] == {
            "a": {"desirable": 1.0, "undesirable": 0.0},
            "b": {"desirable": 0.0, "undesirable": 1.0},
        }
    assert "all match" in verify(out)
    assert any(line.startswith("judgements") for line in info(out))
    assert " for, " in next(iter(head(out, rows=1, model=str(base))))
    # A fresh run elsewhere makes the same shards, and so does going back to one bit.
    fresh = tmp_path / "fresh"
    precompute(config_of(base, data, fresh, **options))
    assert [one["sha256"] for one in manifest.shards] == [one["sha256"] for one in read_manifest(fresh).shards]
    precompute(config_of(base, write_rows(data, ROWS), out))
    assert {path.name: path.read_bytes() for path in (out / "train").iterdir()} == plain
    assert "judgements" not in json.loads((out / "manifest.json").read_bytes())


def test_the_same_judgements_are_complete(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write_rows(tmp_path / "f.jsonl", with_columns({"up": 2, "down": 1}, {"up": 0, "down": 3}, rows=unlabelled()))
    for options, word in (
        ({}, "wrote"),
        ({}, "complete"),
        ({"votes": "count"}, "wrote"),
        ({"votes": "count"}, "complete"),
    ):
        precompute(config_of(base, data, tmp_path / "refs", **options))
        assert word in capsys.readouterr().out


def test_a_dry_run_shows_the_votes_and_writes_nothing(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_rows(tmp_path / "f.jsonl", with_columns({"up": 2, "down": 1}, {"up": 0, "down": 3}, rows=unlabelled()))
    precompute(config_of(base, data, tmp_path / "refs", dry_run=True))
    assert "Krippendorff" in capsys.readouterr().out
    assert not (tmp_path / "refs").exists()


def test_a_scale_in_a_config_is_text(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("rating-scale: 1:5\nvotes: count\n", encoding="utf-8")
    config = resolve(PrecomputeConfig, {}, yaml_path=path)
    assert (config.graded, config.votes) == ((1, 5), "count")


def test_a_run_that_is_stopped_goes_on_with_the_same_masses(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = with_columns({"labels": {"a": [1, 0, 1]}, "weight": 2}, {"labels": {"b": 0}, "weight": 1}, rows=unlabelled())
    data, out, whole = write_rows(tmp_path / "f.jsonl", rows), tmp_path / "refs", tmp_path / "whole"
    precompute(config_of(base, data, whole))
    write = Store.write

    def stop(self: Store, index: int, key: str, rows: Any) -> None:
        if index:
            raise KeyboardInterrupt
        write(self, index, key, rows)

    with monkeypatch.context() as patched:
        patched.setattr(Store, "write", stop)
        with pytest.raises(KeyboardInterrupt):
            precompute(config_of(base, data, out))
    precompute(config_of(base, data, out))
    assert scored(out) == scored(whole)
    assert read_manifest(out).judgements == read_manifest(whole).judgements
    assert "all match" in verify(out)


def test_objectives_of_appended_rows_are_in_all_shards(base: Path, tmp_path: Path) -> None:
    first = with_columns({"labels": {"b": 1}}, {"labels": {"b": 0}}, rows=unlabelled())
    more = with_columns({"labels": {"a": 1}}, rows=unlabelled(chat_rows(14))[12:])
    data, out = write_rows(tmp_path / "f.jsonl", first), tmp_path / "refs"
    precompute(config_of(base, data, out))
    precompute(config_of(base, write_rows(data, [*first, *more]), out))
    assert {tuple(row["objectives"]) for row in scored(out)} == {("a", "b")}
    assert "all match" in verify(out)


def test_the_plan_says_where_votes_of_an_objective_are_split(tmp_path: Path) -> None:
    rows = with_columns(
        {"labels": {"a": [1, 0], "b": 1}}, {"labels": {"a": [1, 1], "b": 0}}, {"labels": {"a": [0, 0], "b": 1}}
    )
    text = page(tmp_path, [{k: v for k, v in one.items() if k != "label"} for one in rows], votes="unanimous")
    assert "objective a: 8 of 12 rows judged, 4 desirable, 4 undesirable, left out in 4 rows: raters disagree" in text


def test_few_rows_are_not_advised_to_keep_unanimous_votes_alone(tmp_path: Path) -> None:
    split = with_columns({"labels": [1, 0]}, {"labels": [0, 1]}, {"labels": [1, 1, 0]}, rows=unlabelled())
    split[0] = {**split[0], "labels": [0, 0]}
    text = page(tmp_path, split)
    assert "agree little" in text
    assert "too few have unanimous votes to train on those alone" in text
    assert "--votes unanimous" not in text


@pytest.mark.parametrize(
    ("columns", "options", "words"),
    [
        ([{"label": True}, {"label": False}], {"votes": "count"}, "--votes count has no effect: no row has votes"),
        ([{"rating": 5}, {"rating": 1}], {"votes": "unanimous", "rating_scale": "1:5"}, "--votes unanimous has no"),
        ([{"up": 3, "down": 1}, {"up": 0, "down": 2}], {"rating_scale": "1:5"}, "--rating-scale has no effect"),
        ([{"up": 3, "down": 1}, {"up": 0, "down": 2}], {"up": ">=4", "down": "<=2"}, "--up and --down have no effect"),
    ],
)
def test_options_that_change_nothing_are_refused(
    tmp_path: Path, columns: Rows, options: dict[str, Any], words: str
) -> None:
    path = write_rows(tmp_path / "f.jsonl", with_columns(*columns, rows=unlabelled()))
    with pytest.raises(FeedbackError, match=words):
        plan_of(path, **options)


def test_votes_of_pairs_are_refused(tmp_path: Path) -> None:
    pairs = [{"prompt": f"q{i}", "chosen": "a", "rejected": "b"} for i in range(4)]
    with pytest.raises(FeedbackError, match="--votes count has no effect"):
        plan_of(write_rows(tmp_path / "f.jsonl", pairs), votes="count")
