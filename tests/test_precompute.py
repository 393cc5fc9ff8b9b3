"""Stage 1 from end to end, on tiny models: numbers, resume, reuse, refusals."""

import hashlib
import json
import os
import re
import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import forks
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import transformers
from feedback_files import chat_rows, write_feedback, write_rows
from models import FAMILIES, save_tiny, tiny_tokenizer
from safetensors.torch import load_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

import offline_kto.precompute.scoring as scoring
from offline_kto.kto_core.cache.manifest import read_manifest
from offline_kto.kto_core.errors import CacheError, KTOError, ModelError, PairingError
from offline_kto.kto_core.lock import only_writer
from offline_kto.kto_core.models.loading import load_causal_lm
from offline_kto.kto_core.models.memory_check import gigabytes
from offline_kto.kto_core.models.precision import Precision
from offline_kto.kto_core.scoring.passes import ScoringPasses
from offline_kto.precompute.config import PrecomputeConfig
from offline_kto.precompute.engines.transformers_scorer import TransformersScorer
from offline_kto.precompute.inspect_cache import head, verify
from offline_kto.precompute.out_folder import check_out
from offline_kto.precompute.plan import make_plan
from offline_kto.precompute.run import precompute
from offline_kto.precompute.store import Store


def scored(folder: Path) -> list[dict[str, Any]]:
    """Rows of a cache in file order."""
    return [row for path in sorted((folder / "train").glob("*.parquet")) for row in pq.read_table(path).to_pylist()]


def naive_logps(model: Any, prompt: list[int], completion: list[int]) -> np.ndarray:
    """Log-probs from full logits of one row alone, softmax in float64."""
    ids = torch.tensor([prompt + completion])
    with torch.no_grad():
        logits = model(ids, use_cache=False).logits[0, len(prompt) - 1 : -1].double()
    return logits.log_softmax(-1).gather(1, ids[0, len(prompt) :, None])[:, 0].numpy()


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_equal_a_naive_forward(family: str, tmp_path: Path, feedback: Path) -> None:
    base = save_tiny(tmp_path / "base", family)
    precompute(PrecomputeConfig(model=str(base), data=str(feedback), out=tmp_path / "refs", max_tokens=200, limit=8))
    # The default kernel leaves Gemma 2's soft-cap out.
    kernel = "eager" if family == "gemma2" else None
    model = transformers.AutoModelForCausalLM.from_pretrained(base, attn_implementation=kernel)
    for row in scored(tmp_path / "refs"):
        own = naive_logps(model, row["prompt_ids"], row["completion_ids"])
        np.testing.assert_allclose(row["ref_token_logps"], own, atol=2e-5)
        assert row["ref_logps"] == pytest.approx(own.sum(), abs=2e-4)
        mismatched = naive_logps(model, row["prompt_ids"], row["kl_completion_ids"][0])
        np.testing.assert_allclose(row["ref_kl_token_logps"][0], mismatched, atol=2e-5)


@pytest.mark.parametrize("config", [{}, {"attn_implementation": "sdpa"}], ids=["silent", "sdpa asked for"])
def test_both_stages_cap_attention_as_the_model_defines_it(
    config: dict[str, str], tmp_path: Path, feedback: Path
) -> None:
    base = save_tiny(tmp_path / "base", "gemma2", attn_logit_softcapping=1.0)
    settings = {**json.loads((base / "config.json").read_text()), **config}
    (base / "config.json").write_text(json.dumps(settings))
    out = tmp_path / "refs"
    precompute(PrecomputeConfig(model=str(base), data=str(feedback), out=out, limit=8))
    assert read_manifest(out).reference["attention"] == "eager"
    arguments: dict[str, Any] = {"attn_implementation": "eager", "dtype": torch.float64}
    definition = transformers.AutoModelForCausalLM.from_pretrained(base, **arguments)
    for row in scored(out):
        own = naive_logps(definition, row["prompt_ids"], row["completion_ids"])
        np.testing.assert_allclose(row["ref_token_logps"], own, atol=2e-5)
    cpu, full = torch.device("cpu"), Precision(torch.float32)
    policy = load_causal_lm(transformers.AutoModelForCausalLM, base, precision=full, device=cpu, frozen=False)
    assert policy.config._attn_implementation == "eager"


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_tokenizer_s_padding_side_changes_nothing(side: str, cache: Path, tmp_path: Path, feedback: Path) -> None:
    """Nothing is padded by the tokenizer."""
    tokenizer = tiny_tokenizer()
    tokenizer.padding_side = side
    base = save_tiny(tmp_path / "base", tokenizer=tokenizer)
    out = tmp_path / "refs"
    precompute(PrecomputeConfig(model=str(base), data=str(feedback), out=out, kl_partners=2, max_length=256))
    for one, other in zip(scored(cache), scored(out), strict=True):
        np.testing.assert_allclose(one["ref_token_logps"], other["ref_token_logps"], atol=1e-5)


def test_scores_do_not_depend_on_budget_shards_or_neighbours(tmp_path: Path, base: Path, feedback: Path) -> None:
    config = PrecomputeConfig(model=str(base), data=str(feedback), out=tmp_path / "a")
    precompute(replace(config, max_tokens=1))
    precompute(replace(config, out=tmp_path / "b", max_tokens=10**6, rows_per_shard=3))
    for one, other in zip(scored(tmp_path / "a"), scored(tmp_path / "b"), strict=True):
        assert one["row_id"] == other["row_id"]
        assert one["kl_completion_ids"] == other["kl_completion_ids"]
        np.testing.assert_allclose(one["ref_token_logps"], other["ref_token_logps"], atol=1e-5)
    a, b = read_manifest(tmp_path / "a"), read_manifest(tmp_path / "b")
    assert a.fingerprint == b.fingerprint
    assert len(b.shards) == 7
    rows = [json.loads(line) for line in feedback.read_text().splitlines()]
    data = write_rows(tmp_path / "reversed.jsonl", rows[::-1])
    precompute(replace(config, data=str(data), out=tmp_path / "c"))
    found = {row["row_id"]: row for row in scored(tmp_path / "c")}
    for row in scored(tmp_path / "a"):
        np.testing.assert_allclose(row["ref_token_logps"], found[row["row_id"]]["ref_token_logps"], atol=1e-5)


def test_mismatched_completions_come_from_other_prompts(cache: Path) -> None:
    rows = scored(cache)
    prompts_of: dict[tuple[int, ...], set[str]] = {}
    for row in rows:
        prompts_of.setdefault(tuple(row["completion_ids"]), set()).add(row["prompt_id"])
    for row in rows:
        assert len(row["kl_completion_ids"]) == 2
        for ids in row["kl_completion_ids"]:
            assert prompts_of[tuple(ids)] - {row["prompt_id"]}


def test_manifest_counts_and_has_no_path(cache: Path, base: Path, feedback: Path) -> None:
    manifest = read_manifest(cache)
    assert manifest.rows == manifest.data["kept"] == manifest.data["read"] == 20
    assert manifest.data["desirable"] + manifest.data["undesirable"] == 20
    # Two completions of one prompt may share a mismatched completion; it is scored once.
    assert 50 < manifest.run["scored_sequences"] <= 60
    assert manifest.run["reused_sequences"] == 0
    content = json.loads((cache / "manifest.json").read_text())
    for name in ("id", "path"):  # the two places that say where the model was found
        content["reference"].pop(name)
    assert str(base) not in json.dumps(content)
    assert str(feedback.parent) not in json.dumps(content)


def test_fingerprint_is_the_same_under_another_path_and_after_use(tmp_path: Path, feedback: Path) -> None:
    marks = []
    for name in ("here", "there"):
        base = save_tiny(tmp_path / name)
        precompute(PrecomputeConfig(model=str(base), data=str(feedback), out=tmp_path / f"refs-{name}"))
        marks.append(read_manifest(tmp_path / f"refs-{name}").fingerprint)
    assert marks[0] == marks[1]


@pytest.mark.parametrize("change", [{"seed": 1}, {"max_length": 64}, {"pairing": "rotate"}, {"kl_partners": 2}])
def test_fingerprint_covers_what_changes_numbers(
    change: dict[str, Any], tmp_path: Path, base: Path, feedback: Path
) -> None:
    config = PrecomputeConfig(model=str(base), data=str(feedback), out=tmp_path / "a")
    precompute(config)
    precompute(replace(config, out=tmp_path / "b", **change))
    assert read_manifest(tmp_path / "a").fingerprint != read_manifest(tmp_path / "b").fingerprint


def test_prompts_without_room_are_dropped_and_long_completions_cut(tmp_path: Path, base: Path) -> None:
    rows = chat_rows(8, seed=1)
    rows[2]["prompt"] = [{"role": "user", "content": "word " * 60}]
    rows[5]["completion"] = [{"role": "assistant", "content": "long " * 60}]
    data = write_rows(tmp_path / "f.jsonl", rows)
    precompute(PrecomputeConfig(model=str(base), data=str(data), out=tmp_path / "refs", max_length=140))
    found = scored(tmp_path / "refs")
    assert [row["source"] for row in found] == [0, 1, 3, 4, 5, 6, 7]
    assert max(len(r["prompt_ids"]) + len(r["completion_ids"]) for r in found) == 140
    assert all(len(r["prompt_ids"]) + len(y) <= 140 for r in found for y in r["kl_completion_ids"])
    data_section = read_manifest(tmp_path / "refs").data
    assert data_section["dropped"] == {"prompt_too_long": 1}
    assert data_section["truncated"] >= 1
    assert data_section["kl_truncated"] >= 1


def test_too_few_prompts_because_of_their_length_are_told_so(tmp_path: Path, base: Path) -> None:
    rows = [{**row, "prompt": [{"role": "user", "content": "word " * 60}]} for row in chat_rows(8)]
    rows[0]["prompt"] = [{"role": "user", "content": "short"}]
    rows[1]["prompt"] = rows[0]["prompt"]
    data = write_rows(tmp_path / "f.jsonl", rows)
    with pytest.raises(
        PairingError, match=r"share one prompt.*Of 8 rows read, 6 were dropped before.*--max-length 140"
    ):
        precompute(PrecomputeConfig(model=str(base), data=str(data), out=tmp_path / "refs", max_length=140))


def test_positions_that_change_with_the_batch_are_refused_beyond_their_limit(tmp_path: Path, feedback: Path) -> None:
    factors = {"short_factor": [1.0] * 4, "long_factor": [8.0] * 4, "factor": 8.0}
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 100, **factors}
    base = save_tiny(tmp_path / "base", rope_parameters=rope)
    config = PrecomputeConfig(model=str(base), data=str(feedback), out=tmp_path / "refs")
    with pytest.raises(ModelError, match=r"beyond 100 this model.s score of a row depends.*--max-length 100"):
        precompute(config)
    precompute(replace(config, max_length=100))
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    for row in scored(tmp_path / "refs"):
        own = naive_logps(model, row["prompt_ids"], row["completion_ids"])
        np.testing.assert_allclose(row["ref_token_logps"], own, atol=2e-5)


def count_scored(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Collect how many sequences each call of the scorer got."""
    calls: list[int] = []
    real = TransformersScorer.score

    def counting(self: Any, sequences: Any, *listener: Any, **options: Any) -> Any:
        calls.append(len(sequences))
        return real(self, sequences, *listener, **options)

    monkeypatch.setattr(TransformersScorer, "score", counting)
    return calls


class TestReuse:
    """A changed data file reuses every score whose ids are there."""

    @pytest.fixture
    def config(self, tmp_path: Path, base: Path) -> PrecomputeConfig:
        data = write_rows(tmp_path / "f.jsonl", chat_rows(30, seed=2))
        config = PrecomputeConfig(model=str(base), data=str(data), out=tmp_path / "refs", rows_per_shard=8)
        precompute(config)
        return config

    def test_same_rows_need_nothing(self, config: PrecomputeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
        calls = count_scored(monkeypatch)
        before = {p: p.stat().st_mtime_ns for p in (config.out).rglob("*")}
        precompute(config)
        assert calls == []
        assert {p: p.stat().st_mtime_ns for p in (config.out).rglob("*")} == before

    def test_flipped_labels_and_another_order_need_no_forward(
        self, config: PrecomputeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        calls = count_scored(monkeypatch)
        rows = chat_rows(30, seed=2)[::-1]
        rows[4]["label"] = not rows[4]["label"]
        write_rows(tmp_path / "f.jsonl", rows)
        old = {row["row_id"]: row for row in scored(config.out)}
        precompute(config)
        assert calls == []
        assert read_manifest(config.out).run["scored_sequences"] == 0
        new = scored(config.out)
        assert [row["source"] for row in new] == list(range(30))
        changed = [row["source"] for row in new if row["label"] != old[row["row_id"]]["label"]]
        assert changed == [4]
        for row in new:
            assert row["kl_completion_ids"] == old[row["row_id"]]["kl_completion_ids"]
            assert row["ref_logps"] == old[row["row_id"]]["ref_logps"]
        verify(config.out)

    def test_appended_rows_cost_little(
        self, config: PrecomputeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        calls = count_scored(monkeypatch)
        extra = {"prompt": "hello", "completion": "world", "label": True}
        write_rows(tmp_path / "f.jsonl", [*chat_rows(30, seed=2), extra])
        precompute(config)
        assert 2 <= sum(calls) <= 4  # its own two, and a neighbour that got another partner
        assert read_manifest(config.out).run["reused_sequences"] >= 55
        verify(config.out)

    def test_rows_that_leave_are_counted(self, config: PrecomputeConfig, capsys: pytest.CaptureFixture[str]) -> None:
        capsys.readouterr()
        precompute(replace(config, limit=20))
        assert "drops       10 scored rows that are no longer in the data" in capsys.readouterr().out
        assert len(scored(config.out)) == 20
        verify(config.out)

    def test_limit_then_all_and_more_partners(
        self, config: PrecomputeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        precompute(replace(config, out=tmp_path / "other", limit=10))
        calls = count_scored(monkeypatch)
        precompute(replace(config, out=tmp_path / "other"))
        assert sum(calls) <= 60 - 10  # at least every labelled row of the ten is reused
        calls.clear()
        precompute(replace(config, out=tmp_path / "other", kl_partners=2))
        assert 0 < sum(calls) <= 30  # the added pairs, and nothing else
        assert all(len(row["ref_kl_logps"]) == 2 for row in scored(tmp_path / "other"))

    def test_a_damaged_shard_alone_is_scored_again(
        self, config: PrecomputeConfig, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path = config.out / "train/00001.parquet"
        good = path.read_bytes()
        path.write_bytes(good[:900] + bytes([good[900] ^ 1]) + good[901:])
        calls = count_scored(monkeypatch)
        with pytest.raises(CacheError, match=r"00001\.parquet"):
            verify(config.out)
        precompute(config)
        verify(config.out)
        assert 0 < sum(calls) <= 16

    def test_a_crash_while_shards_move_into_place_loses_nothing(
        self, config: PrecomputeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        write_rows(tmp_path / "f.jsonl", chat_rows(40, seed=2))
        real = Path.replace
        moved = []

        def crashing(self: Path, target: Any) -> Any:
            if ".next" in str(self) and len(moved) == 2:
                raise KeyboardInterrupt
            moved.append(self)
            return real(self, target)

        with monkeypatch.context() as patch:
            patch.setattr(Path, "replace", crashing)
            with pytest.raises(KeyboardInterrupt):
                precompute(config)
        with pytest.raises(CacheError, match="unfinished"):
            read_manifest(config.out)
        calls = count_scored(monkeypatch)
        precompute(config)
        assert calls == []
        verify(config.out)
        assert not (config.out / ".next").exists()


def test_what_is_not_in_the_manifest_is_removed(config_of: Any, tmp_path: Path) -> None:
    config = config_of(tmp_path)
    precompute(config)
    stray = config.out / "train/00099.parquet"
    stray.write_bytes((config.out / "train/00000.parquet").read_bytes())
    with pytest.raises(CacheError, match=r"00099\.parquet"):
        verify(config.out)
    precompute(config)
    assert not stray.exists()
    verify(config.out)


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_damaged_manifest_costs_no_score(
    config_of: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overwrite: bool
) -> None:
    config = config_of(tmp_path)
    precompute(config)
    (config.out / "manifest.json").write_text('{"a":')
    calls = count_scored(monkeypatch)
    precompute(replace(config, overwrite=overwrite))
    assert calls == []
    verify(config.out)


def test_a_shard_that_was_cut_off_is_scored_again(config_of: Any, tmp_path: Path) -> None:
    config = config_of(tmp_path)
    precompute(config)
    shard = config.out / "train/00001.parquet"
    shard.write_bytes(shard.read_bytes()[:500])
    precompute(config)
    verify(config.out)


@pytest.mark.parametrize("overwrite", [False, True])
def test_somebody_elses_manifest_and_data_are_not_touched(config_of: Any, tmp_path: Path, overwrite: bool) -> None:
    config = replace(config_of(tmp_path), overwrite=overwrite)
    (config.out / "train").mkdir(parents=True)
    (config.out / "manifest.json").write_text('{"theirs": 1}')
    (config.out / "train/data.parquet").write_bytes(b"theirs")
    with pytest.raises(CacheError, match="not the manifest of a reference cache"):
        precompute(config)
    assert (config.out / "manifest.json").read_text() == '{"theirs": 1}'
    assert (config.out / "train/data.parquet").read_bytes() == b"theirs"


def test_edited_counts_are_found(config_of: Any, tmp_path: Path) -> None:
    config = config_of(tmp_path)
    precompute(config)
    content = json.loads((config.out / "manifest.json").read_text())
    content["data"]["desirable"] += 1
    (config.out / "manifest.json").write_text(json.dumps(content))
    with pytest.raises(CacheError, match="desirable rows"):
        verify(config.out)


def test_a_folder_has_one_writer(config_of: Any, tmp_path: Path) -> None:
    config = config_of(tmp_path)
    config.out.mkdir()
    with (
        only_writer(config.out, CacheError),
        pytest.raises(CacheError, match=f"process {os.getpid()} on .* is writing"),
    ):
        precompute(config)
    precompute(config)
    assert sorted(p.name for p in config.out.iterdir()) == ["manifest.json", "train"]


@pytest.fixture
def config_of(base: Path, feedback: Path) -> Any:
    """Options for a small cache under a folder."""
    return lambda folder: PrecomputeConfig(model=str(base), data=str(feedback), out=folder / "refs", rows_per_shard=8)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"max_length": 64}, "tokenization.max_length: 1024 in the cache, 64 now"),
        ({"seed": 5}, "pairing.seed: 0 in the cache, 5 now"),
        ({"pairing": "rotate"}, "pairing.method: shuffled in the cache, rotate now"),
        ({"dtype": "bfloat16"}, "reference.dtype: float32 in the cache, bfloat16 now"),
    ],
)
def test_a_cache_with_other_settings_is_not_touched(
    change: dict[str, Any], named: str, tmp_path: Path, base: Path, feedback: Path
) -> None:
    config = PrecomputeConfig(model=str(base), data=str(feedback), out=tmp_path / "refs")
    precompute(config)
    before = (tmp_path / "refs/manifest.json").read_bytes()
    with pytest.raises(CacheError) as refused:
        precompute(replace(config, **change))
    assert named in str(refused.value)
    assert (tmp_path / "refs/manifest.json").read_bytes() == before
    precompute(replace(config, overwrite=True, **change))
    verify(tmp_path / "refs")


def test_other_weights_tokenizer_and_template_are_named(tmp_path: Path, base: Path, feedback: Path) -> None:
    config = PrecomputeConfig(model=str(base), data=str(feedback), out=tmp_path / "refs")
    precompute(config)
    other = save_tiny(tmp_path / "other", seed=1)
    with pytest.raises(CacheError, match=r"reference\.weights_hash"):
        precompute(replace(config, model=str(other)))
    template = "{% for m in messages %}{{ m['content'] }}|{% endfor %}{% if add_generation_prompt %}{% endif %}"
    spoken = save_tiny(tmp_path / "spoken", tokenizer=tiny_tokenizer(chat_template=template))
    with pytest.raises(CacheError, match=r"tokenizer\.chat_template_hash"):
        precompute(replace(config, model=str(spoken)))


def test_dry_run_writes_nothing(tmp_path: Path, base: Path, feedback: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "refs"
    precompute(PrecomputeConfig(model=str(base), data=str(feedback), out=out, dry_run=True))
    printed = capsys.readouterr().out
    assert "rows        20 records -> 20 rows, 20 kept, dropped: none\n" in printed
    assert re.search(r"to score    \d+ sequences, [\d,]+ tokens", printed)
    assert not out.exists()


def test_the_plan_says_what_scoring_takes(
    tmp_path: Path, base: Path, feedback: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = PrecomputeConfig(model=str(base), data=str(feedback), out=tmp_path / "refs", dry_run=True)

    def printed(**change: object) -> str:
        capsys.readouterr()
        precompute(replace(config, **change))  # type: ignore[arg-type]
        return " ".join(capsys.readouterr().out.split())

    first = printed()
    weights = sum(tensor.numel() for tensor in load_file(base / "model.safetensors").values())
    assert f"memory {gigabytes(4 * weights)} for the weights (float32)" in first
    assert "time unknown: this reference was not measured here" in first
    printed(dry_run=False)
    values = [
        len(row["prompt_ids"]) + 2 * (len(row["completion_ids"]) + sum(map(len, row["kl_completion_ids"])))
        for row in scored(tmp_path / "refs")
    ]
    assert f"disk about {gigabytes(4 * sum(values))} for the cache before compression; " in first
    run = read_manifest(tmp_path / "refs").run
    rate = f"{run['tokens_per_second']:,.0f} tokens/s as in the cache in --out"
    assert (
        f"time at most {run['tokens'] / run['tokens_per_second']:,.0f} s for {run['tokens']:,} tokens, at {rate}"
        in printed()
    )
    assert "time unknown: the cache in --out was scored with other settings" in printed(dtype="bf16")


def test_rotate_pairs_with_the_row_before(tmp_path: Path, base: Path, feedback: Path) -> None:
    config = PrecomputeConfig(model=str(base), data=str(feedback), out=tmp_path / "refs")
    precompute(replace(config, pairing="rotate", pairing_block=4))
    rows = scored(tmp_path / "refs")
    for i, row in enumerate(rows):
        before = i - 1 if i % 4 else i + 3
        assert row["kl_completion_ids"] == [rows[before]["completion_ids"]]


def test_one_prompt_only_is_refused(tmp_path: Path, base: Path) -> None:
    rows = [{"prompt": "same", "completion": f"answer {i}", "label": bool(i % 2)} for i in range(6)]
    data = write_rows(tmp_path / "f.jsonl", rows)
    with pytest.raises(PairingError, match=r"f\.jsonl: All 6 rows share one prompt"):
        precompute(PrecomputeConfig(model=str(base), data=str(data), out=tmp_path / "refs"))


@pytest.mark.parametrize(
    ("count", "options", "words"),
    [
        (1, {}, "1 row is left"),
        (3, {"kl_partners": 5}, "--kl-partners 5 asks for"),
        (3, {"kl_partners": 5, "pairing": "rotate"}, "--kl-partners 5 asks for"),
        (20, {"kl_partners": 3, "pairing": "rotate", "pairing_block": 3}, "blocks of 3 rows"),
        (3, {"rating_threshold": "median"}, "no record has a 'rating'"),
        (3, {"max_length": 2}, "no row is left of 3"),
    ],
)
def test_an_error_about_the_rows_names_their_file(
    tmp_path: Path, base: Path, count: int, options: dict[str, Any], words: str
) -> None:
    rows = [{"prompt": f"question {i}", "completion": f"answer {i}", "label": bool(i % 2)} for i in range(count)]
    config = PrecomputeConfig(model=str(base), data=str(write_rows(tmp_path / "f.jsonl", rows)), out=tmp_path / "refs")
    with pytest.raises(KTOError) as refused:
        precompute(replace(config, **options))
    assert str(refused.value).startswith(f"{tmp_path / 'f.jsonl'}: ")
    assert words in str(refused.value)


def test_a_folder_with_other_files_is_not_written_to(tmp_path: Path, base: Path, feedback: Path) -> None:
    (tmp_path / "thesis.txt").write_text("do not lose me")
    with pytest.raises(CacheError, match=r"thesis\.txt"):
        precompute(PrecomputeConfig(model=str(base), data=str(feedback), out=tmp_path))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["thesis.txt"]


def test_tokenizer_of_another_model_is_refused(tmp_path: Path, feedback: Path) -> None:
    base = save_tiny(tmp_path / "base", vocab_size=50)
    with pytest.raises(ModelError, match="vocabulary has 50 tokens"):
        precompute(PrecomputeConfig(model=str(base), data=str(feedback), out=tmp_path / "refs"))


def test_weights_that_are_not_finite_never_reach_the_cache(tmp_path: Path, feedback: Path) -> None:
    base = save_tiny(tmp_path / "base")
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] = float("nan")
    model.save_pretrained(base)
    with pytest.raises(ModelError):
        precompute(PrecomputeConfig(model=str(base), data=str(feedback), out=tmp_path / "refs"))
    assert not list((tmp_path / "refs").rglob("*.parquet"))


def test_weights_that_change_while_they_are_loaded_are_not_scored(
    tmp_path: Path, base: Path, feedback: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine, other = Path(shutil.copytree(base, tmp_path / "mine")), save_tiny(tmp_path / "other", seed=5)
    real = scoring.load_transformers

    def load(*args: Any) -> Any:
        os.replace(other / "model.safetensors", mine / "model.safetensors")
        return real(*args)

    monkeypatch.setattr(scoring, "load_transformers", load)
    with pytest.raises(ModelError, match="changed since this command was started"):
        precompute(PrecomputeConfig(model=str(mine), data=str(feedback), out=tmp_path / "refs"))
    assert not (tmp_path / "refs").exists()


def test_the_manifest_describes_the_data_that_were_read(
    tmp_path: Path, base: Path, feedback: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They may change, or go, while they are scored."""
    data = Path(shutil.copy(feedback, tmp_path / "feedback.jsonl"))
    digest, real = hashlib.sha256(data.read_bytes()).hexdigest(), Store.write

    def write(*args: Any) -> None:
        data.unlink(missing_ok=True)
        real(*args)

    monkeypatch.setattr(Store, "write", write)
    precompute(PrecomputeConfig(model=str(base), data=str(data), out=tmp_path / "refs"))
    assert read_manifest(tmp_path / "refs").data["files"][0]["sha256"] == digest


def test_out_of_memory_halves_the_budget_and_goes_on(
    tmp_path: Path, base: Path, feedback: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = ScoringPasses._forward

    def small_device(self: ScoringPasses, indices: list[int], inputs: Any) -> Any:
        if inputs.batch.rows > 3:
            raise torch.OutOfMemoryError("simulated")
        return real(self, indices, inputs)

    config = PrecomputeConfig(model=str(base), data=str(feedback), out=tmp_path / "a")
    precompute(config)
    monkeypatch.setattr(ScoringPasses, "_forward", small_device)
    precompute(replace(config, out=tmp_path / "b"))
    for one, other in zip(scored(tmp_path / "a"), scored(tmp_path / "b"), strict=True):
        assert one["ref_logps"] == pytest.approx(other["ref_logps"], abs=1e-4)


def test_head_shows_text_side_by_side(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    print(*head(cache, rows=2, model=None), sep="\n")
    printed = capsys.readouterr().out
    assert printed.count("y'  (") == 4
    assert "user" in printed


@pytest.mark.slow
def test_a_scheduler_s_signal_ends_a_run_as_an_interrupt_does(tmp_path: Path, base: Path) -> None:
    data = write_feedback(tmp_path / "f.jsonl", 300, seed=3)
    out = tmp_path / "refs"
    program = "from offline_kto.precompute.cli import precompute; precompute()"
    options = ["--model", base, "--data", data, "--out", out, "--rows-per-shard", 5, "--max-tokens", 1]
    fork = forks.Fork(program, *options)
    deadline = time.monotonic() + 60
    while not list(out.glob("train/[!.]*.parquet")):
        assert time.monotonic() < deadline, "the run wrote no shard"
        time.sleep(0.01)
    fork.kill(by=signal.SIGTERM)
    done = fork.wait(60)
    assert done.returncode == 143
    assert "Interrupted. Run the same command again to continue." in done.stderr
    assert "Traceback" not in done.stderr
    assert re.search(r"^kept +\d+ of 300 rows \(\d+ of \d+ scores\)$", done.stdout, re.MULTILINE)
    assert {path.name for path in out.iterdir()} <= {"train", ".parts"}
    assert not list((out / "train").glob(".*"))


def test_prompts_that_are_alike_as_unknown_tokens_are_explained(tmp_path: Path) -> None:
    words = Tokenizer(WordLevel({"<unk>": 0, "It": 1, "is": 2, "</s>": 3}, unk_token="<unk>"))
    words.pre_tokenizer = Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", eos_token="</s>")
    rows = [{"prompt": f"zzz{i}", "completion": "It is", "label": bool(i % 2)} for i in range(4)]
    config = PrecomputeConfig(model="m", data=str(write_rows(tmp_path / "f.jsonl", rows)))
    with pytest.raises(PairingError, match=r"share one prompt.*tokens, in 4 of 4 rows, are unknown to the tokenizer"):
        make_plan(config, tokenizer)


@pytest.mark.parametrize(
    "options", [{"chat": "never"}, {"chat": "always"}, {"chat": "never", "map": False}, {"map": False}]
)
def test_head_shows_the_rows_of_the_plan(
    options: dict[str, Any],
    base: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    (tmp_path / "m.yaml").write_text(
        "prompt: ask.text\ncompletion: reply\nlabel: {path: n, up: ['>2'], down: ['<2']}\n"
    )
    mapped = [{"ask": {"text": f"q {n}"}, "reply": f"a\t{n}\\", "n": n} for n in (1, 3, 5, 2)]
    native = [{"prompt": row["ask"]["text"], "completion": row["reply"], "label": row["n"] > 2} for row in mapped[:3]]  # type: ignore[index,operator]
    data = write_rows(tmp_path / "f.jsonl", mapped if options.pop("map", True) else native)
    if "prompt" not in data.read_text():
        options["map"] = str(tmp_path / "m.yaml")
    precompute(PrecomputeConfig(model=str(base), data=str(data), out=tmp_path / "refs", **options))
    lines = capsys.readouterr().out.splitlines()
    begins = [number for number, line in enumerate(lines) if line.startswith("example")]
    planned = sorted(
        (
            lines[n].split()[1].rstrip(","),
            lines[n + 1].split("prompt", 1)[1].strip(),
            lines[n + 2].split("completion", 1)[1].strip(),
        )
        for n in begins
    )
    shown = [line for line in head(tmp_path / "refs", rows=9, model=None) if line]
    found = sorted(
        (row.split()[2], x.removeprefix("x").strip(), y.split(" | ")[0].strip())
        for row, x, y in zip(shown[::4], shown[1::4], shown[3::4], strict=True)
    )
    assert len(planned) == 3
    assert found == planned
    assert ("<|im_start|>" in planned[0][1]) == (options.get("chat") != "never")


@pytest.mark.parametrize(("flag", "words"), [(os.ST_RDONLY, "mounted read-only"), (0, "no permission to write")])
def test_a_folder_that_cannot_be_written_is_refused_with_its_reason(
    flag: int, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    monkeypatch.setattr(os, "statvfs", lambda path: mock.Mock(f_flag=flag))
    with pytest.raises(CacheError, match=f"--out .*/refs: .*{words}.*Choose another folder"):
        check_out(tmp_path / "refs")
