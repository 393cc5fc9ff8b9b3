"""Suspicious rows of a run: which ones, what the file says of them, and metrics of groups of held-out rows."""

import csv
import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from feedback_files import write_rows
from hypothesis import given
from hypothesis import strategies as st
from judged_caches import judged, rewritten
from stopped_runs import train_until
from test_evaluation import some_scores
from test_places import as_of_before
from torch.utils._python_dispatch import TorchDispatchMode

from offline_kto.precompute.config import PrecomputeConfig
from offline_kto.precompute.run import precompute
from offline_kto.train.config import TrainConfig
from offline_kto.train.data.cache_rows import CacheRows, SourceFiles
from offline_kto.train.data.repeated_rows import repeated_rows
from offline_kto.train.run.evaluate_run import evaluate_run
from offline_kto.train.run.suspects import MOST_SUSPECTS, ScoredRows, _largest
from offline_kto.train.run.train_run import train
from offline_kto.train.suspects_file import KINDS, Suspect, read_suspects, write_suspects
from offline_kto.train.trainer.evaluation import Scores, held_out_metrics
from offline_kto.train.trainer.held_out_groups import held_out_groups
from offline_kto.train.trainer.objective import Objective

PROMPTS = 50
FLIPPED = sorted(random.Random(1).sample(range(2 * PROMPTS), 14))


def manners(flipped: list[int]) -> list[dict[str, Any]]:
    """A task that is learned in a few updates: one word is wanted, another is not."""
    rows = [
        {"prompt": f"question {i}", "completion": f" {word} {i}", "label": word == "please"}
        for i in range(PROMPTS)
        for word in ("please", "never")
    ]
    return [{**row, "label": row["label"] != (i in flipped)} for i, row in enumerate(rows)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("suspects")


@pytest.fixture(scope="module")
def noisy(folder: Path, base: Path) -> Path:
    """A cache of rows with some labels flipped, one row repeated, and one with both labels."""
    rows = manners(FLIPPED)
    clean = [i for i in range(len(rows)) if i not in FLIPPED]
    rows += [rows[clean[0]], {**rows[clean[1]], "label": not rows[clean[1]]["label"]}]
    data = write_rows(folder / "rows.jsonl", rows)
    precompute(PrecomputeConfig(model=str(base), data=str(data), out=folder / "refs"))
    return folder / "refs"


@pytest.fixture
def config(noisy: Path, tmp_path: Path) -> TrainConfig:
    return TrainConfig(
        cache=noisy,
        out=tmp_path / "run",
        batch_size=8,
        epochs=2,
        learning_rate=3e-3,
        save_steps=0,
        eval_fraction=0.2,
        device="cpu",
    )


def suspects(run: Path, kind: str) -> list[Suspect]:
    return [one for one in read_suspects(run / "suspects.csv") if one.kind == kind]


class TestRuns:
    @pytest.mark.parametrize("loss", ["kto", "apo_zero", "bco"])
    def test_most_flipped_labels_are_among_the_first(
        self, config: TrainConfig, loss: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        run = train(replace(config, loss=loss))
        flipped = {f"rows.jsonl:{i + 1}" for i in FLIPPED}
        found = suspects(run, "contradicts label")
        assert len({one.place for one in found[: len(FLIPPED)]} & flipped) >= 0.8 * len(FLIPPED)
        assert {one.split for one in found} == {"train", "held_out"}
        rows = manners(FLIPPED)
        for one in found[: len(FLIPPED)]:
            assert one.reward is not None
            assert one.logratio is not None
            assert one.reward == pytest.approx(0.1 * one.logratio, rel=1e-4)
            assert one.change == one.logratio
            row = rows[int(one.place.partition(":")[2]) - 1] if one.place in flipped else None
            if row is not None:
                assert one.label == row["label"]
                assert (one.reward > 0) != one.label
                assert row["prompt"] in one.prompt
                assert row["completion"].strip() in one.completion
        (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("suspects")]
        listed = f"{len(found)} rows whose reward contradicts their label, 1 duplicate, 1 contradiction"
        assert line == f"suspects    {listed}: {run / 'suspects.csv'}"

    def test_equal_rows_are_named_with_their_places(self, config: TrainConfig) -> None:
        run = train(replace(config, max_steps=1))
        clean = [i for i in range(2 * PROMPTS) if i not in FLIPPED]
        last = 2 * PROMPTS + 1
        for kind, first, other in (("duplicate", clean[0], last), ("contradiction", clean[1], last + 1)):
            (one,) = suspects(run, kind)
            assert (one.place, one.others) == (f"rows.jsonl:{first + 1}", f"rows.jsonl:{other}")

    def test_what_changed_most_is_ordered(self, config: TrainConfig) -> None:
        changes = [abs(one.change or 0.0) for one in suspects(train(config), "changed most")]
        assert changes == sorted(changes, reverse=True)
        assert len(changes) == 20

    def test_a_run_without_any_has_neither_file_nor_line(
        self, folder: Path, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        data = write_rows(tmp_path / "clean.jsonl", manners([]))
        precompute(PrecomputeConfig(model=str(base), data=str(data), out=tmp_path / "refs"))
        run = train(
            TrainConfig(cache=tmp_path / "refs", out=tmp_path / "run", max_steps=2, learning_rate=1e-12, device="cpu")
        )
        assert not (run / "suspects.csv").exists()
        assert "suspects" not in capsys.readouterr().out

    def test_a_resumed_run_lists_the_same(self, config: TrainConfig, tmp_path: Path) -> None:
        config = replace(config, save_steps=4)
        whole = train(replace(config, out=tmp_path / "whole"))
        train_until(config, step=9, method="training_step")
        run = train(replace(config, resume=True))
        assert (run / "suspects.csv").read_bytes() == (whole / "suspects.csv").read_bytes()

    def test_a_cache_without_places_numbers_the_records(self, config: TrainConfig, noisy: Path, tmp_path: Path) -> None:
        with_places = train(replace(config, max_steps=4, out=tmp_path / "new"))
        old = train(replace(config, max_steps=4, cache=as_of_before(noisy, tmp_path / "old")))
        for one, other in zip(
            read_suspects(old / "suspects.csv"), read_suspects(with_places / "suspects.csv"), strict=True
        ):
            number = int(other.place.partition(":")[2])
            assert one._replace(place="", others="") == other._replace(place="", others="")
            assert one.place == f"record {number - 1}"
        one, other = ((run / "model.safetensors").read_bytes() for run in (old, with_places))
        assert one == other

    def test_pairs_are_measured_from_their_middle(self, base: Path, tmp_path: Path) -> None:
        rows = [{"prompt": f"question {i}", "chosen": f" please {i}", "rejected": f" never {i}"} for i in range(40)]
        for i in (3, 11, 17, 30, 35):
            rows[i]["chosen"], rows[i]["rejected"] = rows[i]["rejected"], rows[i]["chosen"]
        data = write_rows(tmp_path / "pairs.jsonl", rows)
        precompute(PrecomputeConfig(model=str(base), data=str(data), out=tmp_path / "refs"))
        run = train(
            TrainConfig(
                cache=tmp_path / "refs",
                out=tmp_path / "run",
                loss="dpo",
                batch_size=8,
                epochs=2,
                learning_rate=3e-3,
                eval_fraction=0.2,
                device="cpu",
            )
        )
        wrong = {f"pairs.jsonl:{i + 1}" for i in (3, 11, 17, 30, 35)}
        first = suspects(run, "contradicts label")[:10]  # both rows of each
        assert len({one.place for one in first} & wrong) >= 4

    def test_evaluation_on_a_cache_lists_exact_values(self, config: TrainConfig, noisy: Path, tmp_path: Path) -> None:
        run = train(replace(config, eval_fraction=0.0, keep="last"))
        before = (run / "suspects.csv").read_bytes()
        path = evaluate_run(replace(config, evaluate_only=run, eval_fraction=0.0))
        (found,) = run.glob("suspects-*.csv")
        assert found.stem.removeprefix("suspects") == path.stem.removeprefix("evaluation")
        assert {one.split for one in read_suspects(found) if one.kind == "contradicts label"} == {"evaluated"}
        assert (run / "suspects.csv").read_bytes() == before


class TestChoice:
    def rows(self, cache: Path) -> CacheRows:
        return CacheRows(cache)

    def test_masses_weigh_the_contradiction(self, cache: Path, tmp_path: Path) -> None:
        """Split votes are no suspects, and a row of weight 3 counts three times."""
        masses = [(1.0, 1.0), (3.0, 0.0), (0.0, 1.0), (0.25, 0.75)]
        out = rewritten(cache, tmp_path / "judged", lambda n, row: [judged(row, *masses[n])] if n < len(masses) else [])
        part = ScoredRows(
            "train",
            CacheRows(out),
            np.arange(4),
            np.array([9.0, -2.0, 5.0, 2.0]),
            np.full(4, 1.0),
            np.zeros(4),
        )
        assert part.contradictions().tolist() == [0.0, 9.0, 4.0, 0.5]

    def test_rows_near_the_point_and_rows_never_seen_are_none(self, cache: Path) -> None:
        values = np.array([1e-6, np.nan, -1e-6, 0.0])
        part = ScoredRows("train", CacheRows(cache), np.arange(4), values, np.zeros(4), np.zeros(4))
        assert part.contradictions().tolist() == [0.0] * 4
        assert part.changes().tolist() == [0.0] * 4

    @given(st.lists(st.floats(-5, 5), max_size=40), st.lists(st.floats(-5, 5), max_size=40), st.integers(1, 20))
    def test_the_largest_are_those_that_sorting_finds(self, one: list[float], other: list[float], most: int) -> None:
        values = [np.array(one), np.array(other)]
        found = [values[part][at] for part, at in _largest(values, most)]
        assert found == sorted((value for value in (*one, *other) if value > 0), reverse=True)[:most]

    def test_equal_rows_are_grouped(self, cache: Path, tmp_path: Path) -> None:
        def change(number: int, row: dict[str, Any]) -> list[dict[str, Any]]:
            if number == 0:
                return [row, row, row]
            return [row, {**row, "label": not row["label"]}] if number in (1, 2) else [row]

        rows = CacheRows(rewritten(cache, tmp_path / "repeated", change))
        assert repeated_rows(rows, most=1).duplicates.total == 0  # as the manifest says, so that no id is read
        rows.manifest.data["duplicates"] = 1
        found = repeated_rows(rows, most=1)
        assert [group.tolist() for group in found.duplicates.groups] == [[0, 1, 2]]
        assert [group.tolist() for group in found.contradictions.groups] == [[3, 4]]
        assert (found.duplicates.total, found.contradictions.total) == (1, 2)
        assert repeated_rows(CacheRows(cache), most=5).duplicates == ([], 0)


TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=30) | st.sampled_from(
    ["=1+1", "+1", "-1", "@SUM(A1)", "\t=1", "\r=1", "'=1", "''", "' =1", "=cmd|'/C calc'!A0", '"=1', "a\r\nb", "\0"]
)


def suspect(**values: Any) -> Suspect:
    given_ = {"kind": "duplicate", "place": "f:1", "label": True, "reward": None, "change": None, "logratio": None}
    return Suspect(
        **{**given_, "tokens": 3, "row_id": "a", "prompt": "p", "completion": "c", "others": "", "split": "", **values}
    )


class TestFile:
    @given(place=TEXT, prompt=TEXT, completion=TEXT, others=TEXT, split=TEXT)
    def test_texts_come_back_and_no_cell_is_a_formula(
        self, tmp_path_factory: pytest.TempPathFactory, **texts: str
    ) -> None:
        path = tmp_path_factory.getbasetemp() / "suspects.csv"
        written = [suspect(**texts), suspect(kind="contradicts label", label=False, reward=-1.5, logratio=-15.0)]
        write_suspects(path, written)
        assert read_suspects(path) == written
        with path.open(newline="", encoding="utf-8") as file:
            cells = next(iter(csv.DictReader(file)))
        for name in ("place", "row_id", "prompt", "completion", "others", "split"):
            assert not cells[name].startswith(("=", "+", "-", "@", "\t", "\r"))

    def test_the_columns(self, tmp_path: Path) -> None:
        write_suspects(tmp_path / "s.csv", [])
        columns = "kind,place,label,reward,change,logratio,tokens,row_id,prompt,completion,others,split"
        assert (tmp_path / "s.csv").read_text() == f"{columns}\n"
        assert read_suspects(tmp_path / "s.csv") == []

    @pytest.mark.parametrize(
        "content",
        [
            b"kind,place\nduplicate,f:1\n",
            b"\xff\xfe",
            b",".join(name.encode() for name in Suspect._fields) + b"\nodd,f,desirable,,,,3,a,p,c,,\n",
            b",".join(name.encode() for name in Suspect._fields) + b"\nduplicate,f,desirable,,,,x,a,p,c,,\n",
            b",".join(name.encode() for name in Suspect._fields) + b"\nduplicate,f,desirable\n",
            b",".join(name.encode() for name in Suspect._fields) + b"\nduplicate,f,desirable,,,,3,a,p,c,,,,\n",
        ],
    )
    def test_another_file_is_refused(self, tmp_path: Path, content: bytes) -> None:
        (tmp_path / "s.csv").write_bytes(content)
        with pytest.raises(ValueError, match=r"."):
            read_suspects(tmp_path / "s.csv")

    def test_long_texts_lose_their_middle(self, config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("offline_kto.train.run.suspects._LONGEST_TEXT", 40)
        (one,) = suspects(train(replace(config, max_steps=1)), "duplicate")
        assert one.prompt.startswith("<|im_start|>user\nque [... ")
        assert one.prompt.endswith(" [... 20 characters ...] im_start|>assistant\n")
        assert "..." not in one.completion

    def test_the_list_is_bounded(self) -> None:
        assert MOST_SUSPECTS == 50
        assert len(KINDS) == 4


def with_lengths(scores: Scores) -> Scores:
    return replace(scores, prompt_tokens=torch.arange(40, dtype=torch.float64) // 4)


class TestGroups:
    @pytest.mark.parametrize("loss", ["kto", "apo_zero", "dpo", "ipo"])
    def test_values_are_those_of_the_rows_alone_from_the_common_point(self, loss: str) -> None:
        scores, objective = with_lengths(some_scores()), Objective(loss, 0.3, (1.2, 0.7))
        if objective.rows_in_unit == 2:
            labels = torch.arange(40) % 2 == 0
            scores = replace(scores, masses=torch.stack([labels, ~labels], 1).double(), kl_logratios=None)
        elif loss == "apo_zero":
            scores = replace(scores, kl_logratios=None)
        files = SourceFiles(["b.jsonl", "trained only.jsonl", "a.jsonl"], np.where(np.arange(40) < 24, 2, 0))
        found = held_out_groups(scores, None, objective, files)
        assert [one["by"] for one in found] == [*["prompt length"] * 4, *["class"] * 2, *["source file"] * 2]
        point = None if scores.kl_logratios is None else float(scores.kl_logratios.mean().clamp(min=0))
        for group, chosen in ((found[-2], range(24)), (found[-1], range(24, 40))):
            rows = torch.tensor([*chosen])
            alone = Scores(
                prompts=scores.prompts[chosen],
                masses=scores.masses[rows],
                objectives={},
                tokens=scores.tokens[rows],
                logps=scores.logps[rows],
                logratios=scores.logratios[rows],
                kl_logratios=None if point is None else torch.full((len(rows),), point, dtype=torch.float64),
                shift=None,
            )
            expected = held_out_metrics(alone, objective)
            assert group["rows"] == len(rows)
            assert group["accuracy"] == pytest.approx(expected["accuracy"])
            assert group["margin"] == pytest.approx(expected["rewards/margins"])
            assert group["loss"] == pytest.approx(expected["loss"])
            assert group["accuracy_low"] <= group["accuracy"] <= group["accuracy_high"]
            assert group["margin_low"] < group["margin"] < group["margin_high"]
        whole = held_out_metrics(scores, objective)
        for by in ("prompt length", "class", "source file"):
            of_kind = [one for one in found if one["by"] == by]
            mean = sum(one["rows"] * one["loss"] for one in of_kind) / sum(one["rows"] for one in of_kind)
            assert sum(one["rows"] for one in of_kind) == 40
            assert mean == pytest.approx(whole["loss"])
        assert {one["margin"] for one in found if one["by"] == "class"} == {None}

    def test_masses_and_objectives_and_values_before(self) -> None:
        scores, objective = some_scores(), Objective("kto", 0.3)
        rng = torch.Generator().manual_seed(1)
        masses = torch.rand(40, 2, dtype=torch.float64, generator=rng)
        helpful = torch.where(torch.arange(40)[:, None] < 30, masses, 0.0)
        scores = replace(scores, masses=masses, objectives={"helpful": helpful})
        before = replace(scores, logratios=torch.zeros(40, dtype=torch.float64))
        found = held_out_groups(scores, before, objective)
        (one,) = [one for one in found if one["by"] == "objective"]
        whole, then = held_out_metrics(scores, objective), held_out_metrics(before, objective)
        assert (one["group"], one["rows"]) == ("helpful", 30)
        assert one["accuracy"] == pytest.approx(whole["helpful/accuracy"])
        assert one["margin"] == pytest.approx(whole["helpful/rewards/margins"])
        assert one["accuracy_before"] == pytest.approx(then["helpful/accuracy"])
        assert one["margin_before"] == pytest.approx(0.0)

    def test_one_group_is_none(self) -> None:
        scores = replace(some_scores(), prompt_tokens=torch.full((40,), 7.0))
        ones = replace(scores, masses=torch.tensor([[1.0, 0.0]]).double().repeat(40, 1))
        assert (
            held_out_groups(ones, None, Objective("kto", 0.3), SourceFiles(["a.jsonl"], np.zeros(40, np.int32))) == []
        )

    def test_many_groups_of_many_rows_are_computed_one_after_another(self) -> None:
        """A hundred thousand held-out rows of twenty files took a hundred megabytes."""
        rows, largest = 20_000, 0

        class Sizes(TorchDispatchMode):
            def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
                nonlocal largest
                found = func(*args, **(kwargs or {}))
                largest = max(largest, found.nbytes if isinstance(found, torch.Tensor) else 0)
                return found

        files = SourceFiles([f"{number}.jsonl" for number in range(15)], np.arange(rows) % 15)
        with Sizes():
            found = held_out_groups(some_scores(rows), some_scores(rows), Objective("kto", 0.3), files)
        assert len(found) == 2 + 15
        assert largest == 2 * 8 * rows  # two masses of each row

    def test_many_rows_have_no_intervals(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("offline_kto.train.trainer.held_out_groups._MOST_RESAMPLED", 39)
        found = held_out_groups(with_lengths(some_scores()), None, Objective("kto", 0.3))
        assert not any(name.endswith(("_low", "_high")) for one in found for name in one)

    def test_a_run_writes_them_by_file(self, base: Path, tmp_path: Path) -> None:
        data = tmp_path / "data"
        data.mkdir()
        rows = manners([])
        write_rows(data / "train-00000.jsonl", rows[:60])
        write_rows(data / "train-00001.jsonl", rows[60:])
        precompute(PrecomputeConfig(model=str(base), data=str(data), out=tmp_path / "refs"))
        run = train(
            TrainConfig(
                cache=tmp_path / "refs",
                out=tmp_path / "run",
                max_steps=4,
                batch_size=8,
                learning_rate=3e-3,
                eval_fraction=0.4,
                device="cpu",
            )
        )
        found = json.loads((run / "evaluation.json").read_text())
        files = [one for one in found["groups"] if one["by"] == "source file"]
        assert [one["group"] for one in files] == ["train-00000.jsonl", "train-00001.jsonl"]
        assert sum(one["rows"] for one in files) == found["rows"]
        assert {one["loss_before"] for one in files} == {0.5}
