"""Stage 1 with the real vLLM, held against Transformers. Run by `make test-vllm`; each start takes half a minute."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import transformers
from feedback_files import chat_rows, write_feedback, write_rows
from models import save_tiny, tiny_tokenizer

from offline_kto.kto_core.cache.manifest import read_manifest
from offline_kto.kto_core.errors import ModelError
from offline_kto.kto_core.models.loading import load_causal_lm
from offline_kto.kto_core.models.precision import Precision
from offline_kto.precompute.config import PrecomputeConfig
from offline_kto.precompute.engines.process import engine_process
from offline_kto.precompute.engines.protocol import RemoteScorer, scores_of
from offline_kto.precompute.engines.transformers_scorer import TransformersScorer
from offline_kto.precompute.inspect_cache import verify
from offline_kto.precompute.run import precompute
from offline_kto.train.config import TrainConfig
from offline_kto.train.run.train_run import train

pytest.importorskip("vllm", reason="vLLM is not installed in this environment; make test-vllm has one that holds it")
pytestmark = [pytest.mark.vllm, pytest.mark.slow]

AGREE = 1e-3  # nats a token in float32, the promise
MAX_LENGTH = 96

# Attention heads of a size that vLLM's kernels know.
SHAPE: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "initializer_range": 0.1,
}


def save_base(folder: Path, *, bos: bool = False, **overrides: Any) -> Path:
    """A tiny Llama whose `generation_config` asks for a temperature that must leave no trace."""
    save_tiny(folder, tokenizer=tiny_tokenizer(bos=bos), **{**SHAPE, **overrides})
    settings = transformers.GenerationConfig(
        temperature=0.6, top_p=0.5, top_k=3, do_sample=True, repetition_penalty=1.5
    )
    settings.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("vllm") / "base")


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [row for path in sorted((folder / "train").glob("*.parquet")) for row in pq.read_table(path).to_pylist()]


def assert_agree(one: Path, other: Path) -> None:
    for a, b in zip(rows_of(one), rows_of(other), strict=True):
        assert a["row_id"] == b["row_id"]
        np.testing.assert_allclose(a["ref_token_logps"], b["ref_token_logps"], atol=AGREE)
        np.testing.assert_allclose(a["ref_kl_token_logps"][0], b["ref_kl_token_logps"][0], atol=AGREE)


class TestEngine:
    """One engine, many questions; a step holds fewer tokens than the longest rows have."""

    @pytest.fixture(scope="class")
    def engine(self, base: Path) -> Iterator[RemoteScorer]:
        options = {"model": str(base), "dtype": "float32", "max_length": MAX_LENGTH, "max_tokens": 64}
        options |= {"tensor_parallel": 1, "gpu_memory_utilization": 0.8, "gpus": None, "trust_remote_code": False}
        options |= {"tokens": 1, "weights": 10**6}
        with engine_process({"engine": "vllm", "options": options}, name="vLLM") as scorer:
            yield scorer

    @pytest.fixture(scope="class")
    def sequences(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """Mixed lengths, shared prompts, completions of one token, and a row of exactly the greatest length."""
        random = np.random.default_rng(0)

        def ids(length: int) -> np.ndarray:
            return random.integers(3, 200, length).astype(np.int32)

        found = [(ids(int(random.integers(1, 40))), ids(int(random.integers(1, 50)))) for _ in range(20)]
        found += [(found[0][0], ids(n)) for n in (1, 7, 30)]
        return [*found, (ids(40), ids(MAX_LENGTH - 40)), (ids(1), ids(MAX_LENGTH - 1)), (ids(MAX_LENGTH - 1), ids(1))]

    @pytest.fixture(scope="class")
    def expected(self, base: Path, sequences: list[tuple[np.ndarray, np.ndarray]]) -> list[np.ndarray]:
        import torch

        precision = Precision(torch.float32)
        cpu = torch.device("cpu")
        model = load_causal_lm(transformers.AutoModelForCausalLM, base, precision=precision, device=cpu, frozen=True)
        return scores_of(TransformersScorer(model, precision), sequences)

    def test_equals_transformers(self, engine: Any, sequences: Any, expected: Any) -> None:
        told: list[int] = []
        found = scores_of(engine, sequences, told.append)
        for one, other in zip(found, expected, strict=True):
            assert one.dtype == np.float32
            np.testing.assert_allclose(one, other, atol=AGREE)
        assert sum(told) == sum(len(x) + len(y) for x, y in sequences)

    def test_in_another_order_and_alone(self, engine: Any, sequences: Any, expected: Any) -> None:
        found = scores_of(engine, sequences[::-1])[::-1]
        for one, other in zip(found, expected, strict=True):
            np.testing.assert_allclose(one, other, atol=AGREE)
        for i in (0, 20, len(sequences) - 3):
            alone = scores_of(engine, [sequences[i]])[0]
            np.testing.assert_allclose(alone, expected[i], atol=AGREE)


@pytest.mark.parametrize("bos", [False, True], ids=["no-bos", "bos"])
def test_a_cache_from_vllm_trains(bos: bool, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Real chat rows in, long ones cut to exactly the greatest length; the policy starts where the cache is."""
    base = save_base(tmp_path / "base", bos=bos, tie_word_embeddings=bos)
    data = write_rows(tmp_path / "f.jsonl", [*chat_rows(30), *chat_rows(6, seed=1, longest=60)])
    config = PrecomputeConfig(model=str(base), data=str(data), out=tmp_path / "a", max_length=200)
    precompute(config)
    precompute(replace(config, out=tmp_path / "b", backend="vllm"))
    assert max(len(r["prompt_ids"]) + len(r["completion_ids"]) for r in rows_of(tmp_path / "b")) == 200
    assert_agree(tmp_path / "a", tmp_path / "b")
    verify(tmp_path / "b")
    one, other = read_manifest(tmp_path / "a"), read_manifest(tmp_path / "b")
    assert one.fingerprint != other.fingerprint  # an engine can change a number
    assert other.scorer["backend"] == "vllm"
    assert other.scorer["versions"]["vllm"]
    difference = other.scorer["difference"]
    assert difference["rows"] == 24
    assert 0 <= difference["mean"] <= difference["p95"] <= difference["max"] < AGREE
    assert sorted(path.name for path in (tmp_path / "b").iterdir()) == ["manifest.json", "train"]
    run = train(TrainConfig(cache=tmp_path / "b", out=tmp_path / "run", max_steps=2, batch_size=8, save_steps=0))
    assert json.loads((run / "metrics.jsonl").read_text().splitlines()[0])["loss"] == pytest.approx(0.5, abs=1e-3)
    printed = capfd.readouterr()
    assert "WARNING" not in printed.out + printed.err  # what vLLM prints is in its log


def test_two_workers_with_an_engine_each_score_what_one_process_does(base: Path, tmp_path: Path) -> None:
    """Check two engines as on two GPUs; on a CPU the second one is just another process."""
    data = write_feedback(tmp_path / "f.jsonl", 40, seed=5)
    config = PrecomputeConfig(model=str(base), data=str(data), out=tmp_path / "a", rows_per_shard=15)
    precompute(config)
    precompute(replace(config, out=tmp_path / "b", backend="vllm", workers=2))
    manifest = read_manifest(tmp_path / "b")
    assert sum(worker["shards"] for worker in manifest.run["workers"]) == 3
    assert manifest.scorer["difference"]["rows"] > 0
    assert_agree(tmp_path / "a", tmp_path / "b")
    verify(tmp_path / "b")


def test_a_killed_run_goes_on_and_leaves_no_engine_behind(base: Path, tmp_path: Path) -> None:
    data = write_feedback(tmp_path / "f.jsonl", 120, seed=3)
    out = tmp_path / "refs"
    command = [
        sys.executable,
        "-c",
        "from offline_kto.precompute.cli import precompute; precompute()",
        "--backend",
        "vllm",
    ]
    command += ["--model", str(base), "--data", str(data), "--out", str(out), "--rows-per-shard", "6"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env={**os.environ})
    deadline = time.monotonic() + 200
    while len(list(out.glob("train/[!.]*.parquet"))) < 3:
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.02)
    engines = children_of(process.pid)
    assert engines
    process.send_signal(signal.SIGKILL)
    process.wait()
    finished = len(list(out.glob("train/[!.]*.parquet")))
    assert 3 <= finished < 20
    assert not (out / "manifest.json").exists()
    deadline = time.monotonic() + 30
    while any(is_alive(pid) for pid in engines):
        assert time.monotonic() < deadline, "an engine outlives the run that started it"
        time.sleep(0.1)
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert f"{finished} of 20 shards are complete" in done.stdout
    verify(out)
    precompute(PrecomputeConfig(model=str(base), data=str(data), out=tmp_path / "plain", rows_per_shard=6))
    assert_agree(tmp_path / "plain", out)


def children_of(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def is_alive(pid: int) -> bool:
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False


def test_an_adapter_is_merged(base: Path, tmp_path: Path, feedback: Path) -> None:
    import peft
    import torch

    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.1)
    adapted.save_pretrained(tmp_path / "adapter")
    config = PrecomputeConfig(
        model=str(base), data=str(feedback), out=tmp_path / "a", adapter=str(tmp_path / "adapter")
    )
    precompute(config)
    precompute(replace(config, out=tmp_path / "b", backend="vllm"))
    assert_agree(tmp_path / "a", tmp_path / "b")
    assert sorted(path.name for path in (tmp_path / "b").iterdir()) == ["manifest.json", "train"]


def test_a_model_that_vllm_cannot_run_is_one_message(tmp_path: Path, feedback: Path) -> None:
    """Heads of eight numbers: no kernel takes them."""
    base = save_tiny(tmp_path / "base")
    with pytest.raises(ModelError, match=r"vLLM (stopped|does not start): .*--backend transformers.*Its log: "):
        precompute(PrecomputeConfig(model=str(base), data=str(feedback), out=tmp_path / "refs", backend="vllm"))
    assert not (tmp_path / "refs" / "manifest.json").exists()
