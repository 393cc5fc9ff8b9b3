"""Scored once: what a change of the data costs, counted in sequences, and that training costs nothing at all.

After every change the cache must be the one that a fresh run elsewhere makes.
"""

import json
import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import forks
import numpy as np
import pytest
from feedback_files import chat_rows, write_rows
from naive_pairing import PairableRow
from pairable_rows import hashed, pair_shuffled
from test_precompute import scored

from offline_kto.kto_core.cache.manifest import read_manifest
from offline_kto.kto_core.hashing import sequence_id
from offline_kto.precompute.config import PrecomputeConfig
from offline_kto.precompute.engines.reference import Reference
from offline_kto.precompute.engines.transformers_scorer import TransformersScorer
from offline_kto.precompute.inspect_cache import verify
from offline_kto.precompute.run import precompute
from offline_kto.precompute.store import Store

Rows = list[dict[str, Any]]


@dataclass
class Forwards:
    """What reached the scorer.

    Attributes:
        ids: of every sequence, in order.
        loads: how often the reference was loaded.
    """

    ids: list[str] = field(default_factory=list)
    loads: int = 0


@pytest.fixture
def forwards(monkeypatch: pytest.MonkeyPatch) -> Forwards:
    seen = Forwards()
    score, load = TransformersScorer.score, Reference.load

    def noting(self: TransformersScorer, sequences: Any, *listener: Any, **options: Any) -> Any:
        known = options.get("known", ())
        seen.ids += [sequence_id(*sequence) for i, sequence in enumerate(sequences) if i not in known]
        return score(self, sequences, *listener, **options)

    def counting(self: Reference) -> Any:
        seen.loads += 1
        return load(self)

    monkeypatch.setattr(TransformersScorer, "score", noting)
    monkeypatch.setattr(Reference, "load", counting)
    return seen


def own_id(row: dict[str, Any]) -> str:
    return sequence_id(np.array(row["prompt_ids"]), np.array(row["completion_ids"]))


def pair_ids(row: dict[str, Any]) -> list[str]:
    return [sequence_id(np.array(row["prompt_ids"]), np.array(y)) for y in row["kl_completion_ids"]]


def ids_in(folder: Path) -> set[str]:
    """Every sequence whose score is in a folder's shards."""
    return {key for row in scored(folder) for key in [own_id(row), *pair_ids(row)]}


def snapshot(folder: Path) -> dict[Path, tuple[int, bytes]]:
    """Time stamp and content of every file."""
    return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.rglob("*") if path.is_file()}


def assert_as_fresh(config: PrecomputeConfig) -> None:
    """The cache is complete, tidy, and holds what a run in an empty folder makes of the same data."""
    elsewhere = config.out.with_name(f"{config.out.name}-elsewhere-{len(list(config.out.parent.iterdir()))}")
    precompute(replace(config, out=elsewhere))
    found, expected = read_manifest(config.out), read_manifest(elsewhere)
    assert found.fingerprint == expected.fingerprint
    for name in ("labels_hash", "places_hash"):
        assert found.data.get(name) == expected.data.get(name)
    for mine, fresh in zip(scored(config.out), scored(elsewhere), strict=True):
        for name in ("row_id", "prompt_id", "pair_id", "source", "place", "label", "kl_completion_ids"):
            assert mine[name] == fresh[name], name
        scores = [(mine["ref_token_logps"], fresh["ref_token_logps"])]
        scores += zip(mine["ref_kl_token_logps"], fresh["ref_kl_token_logps"], strict=True)
        for one, other in scores:
            np.testing.assert_allclose(one, other, atol=1e-5, rtol=1e-5)  # other neighbours in a pass: rounding
    verify(config.out)
    assert_tidy(config.out)


def assert_tidy(folder: Path) -> None:
    """Nothing but the manifest and the shards it lists."""
    listed = {shard["file"] for shard in read_manifest(folder).shards}
    files = {str(path.relative_to(folder)) for path in folder.rglob("*")}
    assert files == {"manifest.json", "train", *listed}


def update(config: PrecomputeConfig, forwards: Forwards) -> set[str]:
    """Run again on what is there, and return the sequences that were scored: those that were not there, each once."""
    before = ids_in(config.out)
    forwards.ids.clear()
    precompute(config)
    ran = [*forwards.ids]
    after = ids_in(config.out)
    assert len(ran) == len(set(ran))
    assert set(ran) == after - before
    if ran:
        run = read_manifest(config.out).run
        assert (run["scored_sequences"], run["reused_sequences"]) == (len(ran), len(after) - len(ran))
    assert_as_fresh(config)
    return set(ran)


def apart(count: int, *, start: int = 0) -> Rows:
    """Rows that have nothing in common: no prompt and no completion twice, so that every pair is a neighbour's."""
    return [
        {"prompt": f"question {i}", "completion": f"answer {i}", "label": i % 3 > 0}
        for i in range(start, start + count)
    ]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return tmp_path / "feedback.jsonl"


@pytest.fixture
def config(tmp_path: Path, base: Path, data: Path) -> PrecomputeConfig:
    return PrecomputeConfig(model=str(base), data=str(data), out=tmp_path / "refs", rows_per_shard=8)


def made(config: PrecomputeConfig, rows: Rows) -> PrecomputeConfig:
    """A cache of these rows."""
    write_rows(Path(config.data), rows)
    precompute(config)
    return config


def flipped(rows: Rows, *which: int) -> Rows:
    return [{**row, "label": not row["label"]} if i in which else row for i, row in enumerate(rows)]


def shuffled(rows: Rows) -> Rows:
    return random.Random(5).sample(rows, len(rows))


def twice(rows: Rows, *which: int) -> Rows:
    return [*rows, *(rows[i] for i in which)]


class TestNoForwardPass:
    """What needs none does not even load the reference."""

    @pytest.mark.parametrize(
        ("edit", "options"),
        [
            (lambda rows: rows, {}),
            (lambda rows: flipped(rows, 4), {}),
            (lambda rows: flipped(rows, *range(24)), {}),
            (shuffled, {}),
            (lambda rows: flipped(shuffled(rows), 0, 23), {"rows_per_shard": 3}),
            (lambda rows: rows, {"rows_per_shard": 1}),
            (lambda rows: rows[::-1], {"rows_per_shard": 100}),
            (lambda rows: rows, {"max_tokens": 1}),
            (lambda rows: rows, {"overwrite": True}),
            (shuffled, {"overwrite": True, "max_tokens": 64}),
        ],
        ids=[
            "the same rows",
            "a flipped label",
            "all labels flipped",
            "another order",
            "another order, flipped labels and smaller shards",
            "a shard for each row",
            "backwards, in one shard",
            "another budget",
            "overwriting with the same",
            "overwriting with another order",
        ],
    )
    def test_the_same_completions_in_any_guise_cost_none(
        self,
        edit: Callable[[Rows], Rows],
        options: dict[str, Any],
        config: PrecomputeConfig,
        data: Path,
        forwards: Forwards,
    ) -> None:
        made(config, chat_rows(24))
        write_rows(data, edit(chat_rows(24)))
        forwards.loads = 0
        assert update(replace(config, **options), forwards) == set()
        assert forwards.loads == 1  # by the fresh run that it is compared with

    def test_the_same_rows_in_a_file_of_another_name_and_format_cost_none(
        self, config: PrecomputeConfig, data: Path, forwards: Forwards
    ) -> None:
        made(config, apart(24))
        other = data.with_name("renamed.json")
        other.write_text(json.dumps(apart(24)), encoding="utf-8")
        assert update(replace(config, data=str(other)), forwards) == set()

    def test_chosen_and_rejected_exchanged_cost_none(
        self, config: PrecomputeConfig, data: Path, forwards: Forwards
    ) -> None:
        pairs = [{"prompt": f"question {i}", "chosen": f"good {i}", "rejected": f"bad {i}"} for i in range(10)]
        made(config, pairs)
        write_rows(data, [{**pair, "chosen": pair["rejected"], "rejected": pair["chosen"]} for pair in pairs])
        assert update(config, forwards) == set()
        assert [row["label"] for row in scored(config.out)] == [True, False] * 10

    def test_another_threshold_of_ratings_costs_none(self, config: PrecomputeConfig, forwards: Forwards) -> None:
        rows = [{"prompt": f"question {i}", "completion": f"answer {i}", "rating": i % 5} for i in range(20)]
        made(replace(config, rating_threshold="3"), rows)
        assert update(replace(config, rating_threshold="2"), forwards) == set()
        assert read_manifest(config.out).data["desirable"] == 12

    def test_fewer_partners_cost_none(self, config: PrecomputeConfig, forwards: Forwards) -> None:
        three = replace(config, kl_partners=3)
        made(three, chat_rows(24))
        assert update(config, forwards) == set()
        assert all(len(row["ref_kl_logps"]) == 1 for row in scored(config.out))


class TestOnlyWhatIsNew:
    @pytest.mark.parametrize("partners", [1, 3])
    @pytest.mark.parametrize("place", [0, 11, 24], ids=["in front", "in the middle", "at the end"])
    def test_added_rows_cost_themselves_and_their_neighbours(
        self, place: int, partners: int, config: PrecomputeConfig, data: Path, forwards: Forwards
    ) -> None:
        """A row that joins the ring brings its own sequences, and one pair for each row that now meets it."""
        config = replace(config, kl_partners=partners)
        rows, new = apart(24), apart(2, start=24)
        made(config, rows)
        write_rows(data, [*rows[:place], *new, *rows[place:]])
        ran = update(config, forwards)
        found = scored(config.out)
        joined = found[place : place + 2]
        texts = [row["completion_ids"] for row in joined]
        expected = {key for row in joined for key in [own_id(row), *pair_ids(row)]}
        for row in found:
            expected |= {key for key, y in zip(pair_ids(row), row["kl_completion_ids"], strict=True) if y in texts}
        assert ran == expected
        assert len(ran) <= 2 * (1 + 2 * partners)

    @pytest.mark.parametrize("partners", [1, 3])
    @pytest.mark.parametrize("gone", [(0,), (7, 8, 9), (1, 6, 12, 23)])
    def test_rows_that_leave_cost_the_pairs_they_were_in(
        self, gone: tuple[int, ...], partners: int, config: PrecomputeConfig, data: Path, forwards: Forwards
    ) -> None:
        """Each row that loses a partner gets another one; nothing else is scored."""
        config = replace(config, kl_partners=partners)
        made(config, apart(24))
        old = scored(config.out)
        left = [old[i]["completion_ids"] for i in gone]
        lost = {
            row["prompt_id"]: sum(y in left for y in row["kl_completion_ids"])
            for i, row in enumerate(old)
            if i not in gone
        }
        write_rows(data, [row for i, row in enumerate(apart(24)) if i not in gone])
        ran = update(config, forwards)
        paid = {row["prompt_id"]: len(ran & {*pair_ids(row)}) for row in scored(config.out)}
        assert paid == lost
        assert len(ran) == sum(lost.values()) <= partners * len(gone)

    def test_rows_that_leave_and_come_back_cost_what_their_leaving_dropped(
        self, config: PrecomputeConfig, data: Path, forwards: Forwards
    ) -> None:
        made(config, apart(24))
        whole = ids_in(config.out)
        write_rows(data, apart(22))
        update(config, forwards)
        kept = ids_in(config.out) & whole
        write_rows(data, apart(24))
        assert update(config, forwards) == whole - kept

    def test_a_limit_and_then_all_rows_scores_none_of_the_first_again(
        self, config: PrecomputeConfig, forwards: Forwards
    ) -> None:
        made(replace(config, limit=10), apart(24))
        first = {own_id(row) for row in scored(config.out)}
        ran = update(config, forwards)
        assert not ran & first
        # Two for each new row, and one for each of the ten that meets a new one.
        assert len(ran) <= 2 * 14 + 10

    def test_more_partners_cost_the_added_pairs(self, config: PrecomputeConfig, forwards: Forwards) -> None:
        made(config, apart(24))
        ran = update(replace(config, kl_partners=3), forwards)
        added = {key for row in scored(config.out) for key in pair_ids(row)[1:]}
        assert ran == added
        assert len(ran) == 2 * 24

    @pytest.mark.parametrize("label", [True, False])
    def test_a_repeated_row_costs_no_score_of_its_own(
        self, label: bool, config: PrecomputeConfig, data: Path, forwards: Forwards
    ) -> None:
        made(config, apart(24))
        again = {**apart(24)[5], "label": label}
        write_rows(data, [*apart(24), again])
        ran = update(config, forwards)
        assert not ran & {own_id(row) for row in scored(config.out)}
        assert len(ran) <= 2
        write_rows(data, apart(24))
        assert len(update(config, forwards)) <= 2

    @pytest.mark.parametrize("shard", [1, 5, 100])
    def test_repeated_rows_are_scored_once_however_they_lie(
        self, shard: int, config: PrecomputeConfig, data: Path, forwards: Forwards
    ) -> None:
        made(replace(config, rows_per_shard=shard), twice(chat_rows(12), *range(12)))
        assert len(forwards.ids) == len(set(forwards.ids)) == len(ids_in(config.out))
        assert_as_fresh(config)

    @pytest.mark.parametrize("edit", ["append", "remove"])
    def test_prompts_with_several_completions_cost_little_more(
        self, edit: str, config: PrecomputeConfig, data: Path, forwards: Forwards
    ) -> None:
        rows = chat_rows(60, seed=2)
        made(config, rows[:57] if edit == "append" else rows)
        write_rows(data, rows if edit == "append" else [*rows[:20], *rows[23:]])
        assert 0 < len(update(config, forwards)) <= 3 * 4

    @pytest.mark.parametrize("partners", [1, 3])
    @pytest.mark.parametrize("share", [0.0, 0.1, 0.3])
    def test_one_row_more_or_less_changes_few_pairs_of_many(self, share: float, partners: int) -> None:
        """Also where one prompt holds up to three rows in ten."""
        rng = random.Random(1)
        rows = [hashed(f"r{i}", "often" if rng.random() < share else f"p{i}", f"c{i}") for i in range(600)]

        def pairs(rows: list[PairableRow]) -> set[tuple[str, str]]:
            chosen = pair_shuffled(rows, partners=partners, seed=0).partners
            return {(rows[i].row_id, rows[t].row_id) for i, targets in enumerate(chosen) for t in targets}

        whole = pairs(rows)
        for i in range(0, 600, 60):
            more = [*rows, hashed(f"new{i}", ("often", f"q{i}")[i % 120 > 0], f"new{i}")]
            assert len(pairs(more) - whole) <= 8 * partners
            assert len(pairs(rows[:i] + rows[i + 1 :]) - whole) <= 8 * partners


class TestInterrupted:
    """A run that was stopped while it updated a finished cache, and what the next one makes of that."""

    @staticmethod
    def stopped(config: PrecomputeConfig, *, after: int) -> None:
        """Run until `after` shards are written."""
        write, written = Store.write, []

        def stopping(self: Store, *arguments: Any) -> None:
            if len(written) == after:
                raise KeyboardInterrupt
            written.append(write(self, *arguments))

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Store, "write", stopping)
            with pytest.raises(KeyboardInterrupt):
                precompute(config)

    def test_the_old_cache_stays_whole(self, config: PrecomputeConfig, data: Path) -> None:
        made(config, apart(24))
        before = snapshot(config.out)
        write_rows(data, apart(40))
        self.stopped(config, after=3)
        assert {path: content for path, content in snapshot(config.out).items() if path in before} == before
        verify(config.out)

    def test_what_was_finished_is_not_scored_again(
        self, config: PrecomputeConfig, data: Path, forwards: Forwards
    ) -> None:
        made(config, apart(24))
        write_rows(data, apart(40))
        self.stopped(config, after=4)
        finished = {key for name in (".", ".next", ".parts") for key in ids_in(config.out / name)}
        assert ids_in(config.out / ".parts")  # of the fifth shard, which was not written
        forwards.ids.clear()
        precompute(config)
        assert set(forwards.ids) == ids_in(config.out) - finished
        assert not (config.out / ".parts").exists()
        assert_as_fresh(config)

    @pytest.mark.parametrize("again", [False, True], ids=["the old data", "the old data in another order"])
    def test_going_back_to_the_old_data_leaves_nothing_behind(
        self, again: bool, config: PrecomputeConfig, data: Path, forwards: Forwards
    ) -> None:
        made(config, apart(24))
        write_rows(data, apart(40))
        self.stopped(config, after=4)
        write_rows(data, shuffled(apart(24)) if again else apart(24))
        forwards.ids.clear()
        precompute(config)
        assert forwards.ids == []
        assert_as_fresh(config)

    @pytest.mark.parametrize("finished", [False, True], ids=["the first run", "an update"])
    @pytest.mark.parametrize("change", [{"rows_per_shard": 2}, {"kl_partners": 2}])
    def test_stopped_twice_with_other_options_scores_no_finished_sequence_again(
        self, change: dict[str, Any], finished: bool, config: PrecomputeConfig, data: Path, forwards: Forwards
    ) -> None:
        """The second run cuts other shards; writing its first one must not lose scores of the first run."""
        write_rows(data, apart(24))
        if finished:
            precompute(replace(config, limit=6))
        self.stopped(config, after=2)
        kept = {key for folder in (config.out, config.out / ".next") for key in ids_in(folder)}
        self.stopped(replace(config, **change), after=1)
        forwards.ids.clear()
        precompute(config)
        assert not set(forwards.ids) & kept
        assert_as_fresh(config)


class TestManyEdits:
    """Edit after edit on one folder: what is scored is what was not there, once, and the cache is always the fresh one."""

    EDITS = ("append", "remove", "flip", "reorder", "repeat", "rows_per_shard", "kl_partners", "replace", "nothing")

    # Among fifteen, all kinds of edits are drawn with either seed.
    @pytest.mark.parametrize(
        ("pairing", "seed", "edits"),
        [
            ("shuffled", 0, 6),
            pytest.param("shuffled", 0, 15, marks=pytest.mark.slow),
            pytest.param("rotate", 3, 15, marks=pytest.mark.slow),
        ],
    )
    def test_in_a_row(
        self, pairing: str, seed: int, edits: int, config: PrecomputeConfig, data: Path, forwards: Forwards
    ) -> None:
        rng = random.Random(seed)
        pool = chat_rows(120, seed=seed, longest=4)
        rows, rest = pool[:16], pool[16:]
        config = made(replace(config, pairing=pairing, pairing_block=6), rows)
        for _ in range(edits):
            edit = rng.choice(self.EDITS)
            if edit == "append":
                rows, rest = [*rows, *rest[:3]], rest[3:]
            elif edit == "remove" and len(rows) > 12:
                gone = set(rng.sample(range(len(rows)), 2))
                rows = [row for i, row in enumerate(rows) if i not in gone]
            elif edit == "replace":
                place, rows = rng.randrange(len(rows)), [*rows]
                rows[place], rest = rest[0], rest[1:]
            elif edit == "flip":
                rows = flipped(rows, *rng.sample(range(len(rows)), 3))
            elif edit == "reorder":
                rows = rng.sample(rows, len(rows))
            elif edit == "repeat":
                rows = twice(rows, rng.randrange(len(rows) - 4))
            elif edit == "rows_per_shard":
                config = replace(config, rows_per_shard=rng.randint(1, 20))
            elif edit == "kl_partners":
                config = replace(config, kl_partners=rng.randint(1, 3))
            write_rows(data, rows)
            ran = update(config, forwards)
            if edit in ("flip", "rows_per_shard", "nothing") or (edit == "reorder" and pairing == "shuffled"):
                assert not ran, edit


TRAINING = """
import json
import sys
from pathlib import Path

import offline_kto.train.model.policy
from offline_kto.train.config import TrainConfig
from offline_kto.train.run.train_run import train as run

loaded = []
real = offline_kto.train.model.policy.load_causal_lm

def counting(*arguments, **options):
    loaded.append(arguments[1])
    return real(*arguments, **options)

offline_kto.train.model.policy.load_causal_lm = counting
cache, out, changes = Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3])
for i, change in enumerate(changes):
    run(TrainConfig(cache=cache, out=out / str(i), **{"max_steps": 2, "save_steps": 0, "device": "cpu", **change}))
stage_1 = sorted(name for name in sys.modules if name.startswith("offline_kto.precompute"))
print(json.dumps({"loaded": len(loaded), "stage_1": stage_1}))
"""

NOT_OF_THE_CACHE = [
    {"learning_rate": 1e-3, "scheduler": "cosine", "warmup": 1, "weight_decay": 0.1, "loss": "kto", "beta": 0.5},
    {"desirable_weight": 1.5, "undesirable_weight": "auto", "batch_size": 3, "max_tokens": 1},
    {"max_steps": None, "epochs": 2, "batch_size": 16},
    {"lora_rank": 2, "seed": 7, "shuffle": False},
    {"eval_fraction": 0.3, "max_length": 60},
]


@pytest.mark.slow
def test_no_option_of_training_costs_a_forward_pass_of_the_reference(
    config: PrecomputeConfig, tmp_path: Path, forwards: Forwards
) -> None:
    """One model is loaded for each run, the policy; no module of stage 1 is, and the cache is only read."""
    made(config, chat_rows(24))
    before = snapshot(config.out)
    program = forks.AS_IF_FRESH + TRAINING
    done = forks.run(program, config.out, tmp_path / "runs", json.dumps(NOT_OF_THE_CACHE))
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout.splitlines()[-1]) == {"loaded": len(NOT_OF_THE_CACHE), "stage_1": []}
    assert snapshot(config.out) == before
    forwards.ids.clear()
    precompute(config)
    assert forwards.ids == []
    assert snapshot(config.out) == before
