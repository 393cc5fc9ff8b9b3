"""Loading and scoring on real GPUs: equal to the CPU, each process on its own GPU, models over several, vLLM, sweeps."""

import importlib.util
import json
import os
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import transformers
from feedback_files import write_feedback
from gpus import DEVICE, GPUS, MARKS, REHEARSAL, card_only, two_gpus
from models import random_rows, save_tiny, tiny_tokenizer
from safetensors.torch import load_file

from offline_kto.kto_core.cache.manifest import read_manifest
from offline_kto.kto_core.errors import TrainingError
from offline_kto.kto_core.models.loading import load_causal_lm
from offline_kto.kto_core.models.memory_check import Sizes, free_bytes
from offline_kto.kto_core.models.outline import find_outline
from offline_kto.kto_core.models.precision import Precision
from offline_kto.precompute.config import PrecomputeConfig
from offline_kto.precompute.engines.protocol import scores_of
from offline_kto.precompute.engines.transformers_scorer import TransformersScorer
from offline_kto.precompute.inspect_cache import verify
from offline_kto.precompute.run import precompute
from offline_kto.train.config import TrainConfig
from offline_kto.train.model.training_memory import check_training_fits
from offline_kto.train.run.train_run import train
from offline_kto.train.sweep.config import SweepConfig
from offline_kto.train.sweep.sweep import sweep

pytestmark = MARKS
bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed"
)
vllm = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")

FULL, HALF = Precision(torch.float32), Precision(torch.bfloat16)
FIRST = DEVICE if REHEARSAL else torch.device("cuda", 0)

# Nats a token by which a GPU may differ from a CPU: float32 by other orders of sums (largest), bfloat16 by rounding (mean).
CLOSE, ROUNDED = 1e-4, 0.05

# Attention heads of a size that fused kernels take; logits far from flat.
SHAPE: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "initializer_range": 0.1,
    "max_position_embeddings": 8192,
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("gpu") / "model", **SHAPE)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_feedback(tmp_path_factory.mktemp("data") / "feedback.jsonl", 60, seed=2)


@pytest.fixture(scope="module")
def four_bits(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("nf4") / "model"
    settings = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    narrow = transformers.AutoModelForCausalLM.from_pretrained(
        model, quantization_config=settings, device_map={"": FIRST}
    )
    narrow.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def load(folder: Path, device: torch.device, precision: Precision, **options: Any) -> Any:
    model = load_causal_lm(
        transformers.AutoModelForCausalLM, folder, precision=precision, device=device, frozen=True, **options
    )
    return model.eval()


def scores(model: Any, precision: Precision, rows: Any) -> np.ndarray:
    return np.concatenate(scores_of(TransformersScorer(model, precision), rows))


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [row for path in sorted((folder / "train").glob("*.parquet")) for row in pq.read_table(path).to_pylist()]


def apart(one: Path, other: Path) -> np.ndarray:
    """Differences of all scores of two caches of the same rows."""
    pairs = list(zip(rows_of(one), rows_of(other), strict=True))
    assert [a["row_id"] for a, _ in pairs] == [b["row_id"] for _, b in pairs]
    differences = []
    for a, b in pairs:
        differences.append(np.subtract(a["ref_token_logps"], b["ref_token_logps"]))
        differences.append(np.subtract(a["ref_kl_token_logps"][0], b["ref_kl_token_logps"][0]))
    return np.concatenate(differences)


def records_of(run: Path) -> list[dict[str, Any]]:
    records = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [record for record in records if "grad_norm" in record]


def weights_of(folder: Path) -> torch.Tensor:
    weights = load_file(folder / "model.safetensors")
    return torch.cat([weights[name].double().flatten() for name in sorted(weights)])


class TestOneGpu:
    """g3: scores on a GPU are those on a CPU."""

    @pytest.fixture(scope="class")
    def on_cpu(self, model: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> PrecomputeConfig:
        out = tmp_path_factory.mktemp("cpu") / "refs"
        config = PrecomputeConfig(
            model=str(model), data=str(data), out=out, backend="transformers", device="cpu", dtype="float32"
        )
        precompute(config)
        return config

    def test_caches_are_those_of_the_cpu(
        self, on_cpu: PrecomputeConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        full = replace(on_cpu, out=tmp_path / "full", device=DEVICE.type)
        half = replace(full, out=tmp_path / "half", dtype="bfloat16" if REHEARSAL else "auto")
        for config in (full, half):
            precompute(config)
            verify(config.out)
        assert "bfloat16 on cuda" in capsys.readouterr().out or REHEARSAL
        assert read_manifest(tmp_path / "half").reference["dtype"] == "bfloat16"
        assert np.abs(apart(tmp_path / "full", on_cpu.out)).max() < CLOSE
        rounded = apart(tmp_path / "half", on_cpu.out)
        print(f"bfloat16 against float32: mean {np.abs(rounded).mean():.4f}, signed {rounded.mean():.5f} nats a token")
        assert np.abs(rounded).mean() < ROUNDED

    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    def test_training_starts_where_the_cache_is(
        self, on_cpu: PrecomputeConfig, tmp_path: Path, dtype: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        precompute(replace(on_cpu, out=tmp_path / "refs", device=DEVICE.type, dtype=dtype))
        config = TrainConfig(
            cache=tmp_path / "refs", out=tmp_path / "run", dtype=dtype, max_steps=3, batch_size=8, save_steps=0
        )
        record = records_of(train(config))[0]
        start = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("start "))
        assert float(start.split("differ by ")[1].split()[0]) < 0.01
        assert record["loss"] == pytest.approx(0.5, abs=1e-2)

    @pytest.mark.parametrize(("dtype", "loss", "weights"), [("float32", 1e-4, 1e-2), ("bfloat16", 5e-2, 0.5)])
    def test_training_is_that_of_the_cpu(
        self, on_cpu: PrecomputeConfig, model: Path, tmp_path: Path, dtype: str, loss: float, weights: float
    ) -> None:
        """Losses in nats, and how far the weights are apart in relation to how far they moved."""
        config = TrainConfig(
            cache=on_cpu.out, out=tmp_path / "cpu", device="cpu", dtype="float32", max_steps=3, batch_size=8
        )
        config = replace(config, learning_rate=1e-4, save_steps=0)
        theirs = train(config)
        config = replace(config, out=tmp_path / "gpu", device=DEVICE.type, dtype=dtype)
        mine = train(replace(config, allow_different_policy=dtype != "float32"))
        losses = [[record["loss"] for record in records_of(run)] for run in (mine, theirs)]
        assert losses[0] == pytest.approx(losses[1], abs=loss)
        start, end, other = (weights_of(folder) for folder in (model, theirs, mine))
        assert (other - end).norm() < weights * (end - start).norm()

    def test_weights_are_those_loaded_by_way_of_the_cpu(self, model: Path) -> None:
        """Straight onto the GPU, and as before: loaded on the CPU, then moved."""
        for precision in (FULL, HALF):
            straight, plain = load(model, FIRST, precision), load(model, torch.device("cpu"), precision)
            for (name, one), (_, other) in zip(straight.named_parameters(), plain.named_parameters(), strict=True):
                assert one.device == FIRST, name
                assert one.dtype == other.dtype, name
                assert torch.equal(one.cpu(), other), name

    @card_only
    def test_a_model_that_does_not_fit_is_refused_before_it_is_loaded(self, model: Path) -> None:
        outline = find_outline(transformers, model, trust_remote_code=False)
        sizes = Sizes.of(outline.model, model)
        before = torch.cuda.memory_allocated(FIRST)
        free = free_bytes(FIRST)
        assert free is not None
        check_training_fits("tiny", sizes, TrainConfig(), HALF, FIRST)
        huge = Sizes(matrices=free // 16, others=sizes.others)
        with pytest.raises(
            TrainingError, match=r"full fine-tuning .* needs .*, and .* are free on cuda:0\. What fits: "
        ):
            check_training_fits("huge", huge, TrainConfig(), HALF, FIRST)
        assert torch.cuda.memory_allocated(FIRST) == before

    def test_memory_is_what_was_counted(self, model: Path) -> None:
        sizes = Sizes.of(find_outline(transformers, model, trust_remote_code=False).model, model)
        before = torch.cuda.memory_allocated(FIRST)
        loaded = load(model, FIRST, HALF)
        used = torch.cuda.memory_allocated(FIRST) - before
        counted = sizes.frozen(torch.bfloat16)
        assert loaded.device == FIRST
        # The allocator rounds every tensor up to 512 bytes; buffers come on top.
        assert REHEARSAL or counted <= used <= counted + 1024 * (
            len(list(loaded.parameters())) + len(list(loaded.buffers()))
        )

    @bitsandbytes
    def test_four_bits_score(self, four_bits: Path) -> None:
        rows = random_rows(12, vocabulary=200)
        model = load(four_bits, FIRST, HALF)
        assert {p.device for p in model.parameters()} == {FIRST}
        assert np.isfinite(scores(model, HALF, rows)).all()


class TestSweepOnOneGpu:
    """g10: trials of two workers on one GPU train as `kto-train` does."""

    def test_each_trial_has_the_numbers_of_a_run_of_its_own(self, model: Path, data: Path, tmp_path: Path) -> None:
        refs = tmp_path / "refs"
        precompute(PrecomputeConfig(model=str(model), data=str(data), out=refs, backend="transformers"))
        shared = {"batch_size": 8, "max_steps": 3, "eval_fraction": 0.3, "max_tokens": 2048, "device": DEVICE.type}
        rates = [1e-6, 1e-5, 1e-4]
        out = tmp_path / "sweep"
        sweep(SweepConfig(cache=refs, out=out, search="grid", workers=2, space={"learning_rate": rates}, train=shared))
        trials = sorted(path for path in (out / "trials").iterdir() if path.is_dir())
        assert len(trials) == len(rates)
        for trial in trials:
            rate = records_of(trial)[0]["learning_rate"]
            alone = TrainConfig(
                cache=refs,
                out=tmp_path / f"run-{trial.name}",
                learning_rate=rate,
                batch_size=8,
                max_steps=3,
                eval_fraction=0.3,
                max_tokens=2048,
                device=DEVICE.type,
            )
            mine, theirs = records_of(train(alone))[0], records_of(trial)[0]
            for name in ("loss", "kl_raw", "grad_norm"):  # without autocast the gradient norm moved by 0.1 %
                assert theirs[name] == pytest.approx(mine[name], rel=1e-4, abs=1e-6), (trial.name, name)


@two_gpus
class TestSeveralGpus:
    """g18 and g19."""

    @pytest.mark.parametrize("kind", ["16 bits", pytest.param("4 bits", marks=bitsandbytes)])
    def test_a_worker_on_each_gpu_writes_the_cache_of_one(
        self, request: pytest.FixtureRequest, data: Path, tmp_path: Path, kind: str
    ) -> None:
        folder = request.getfixturevalue("model" if kind == "16 bits" else "four_bits")
        config = PrecomputeConfig(
            model=str(folder), data=str(data), out=tmp_path / "all", backend="transformers", rows_per_shard=8
        )
        precompute(replace(config, workers=GPUS if REHEARSAL else None))
        precompute(replace(config, out=tmp_path / "one", workers=1))
        shards = read_manifest(tmp_path / "one").shards
        run = read_manifest(tmp_path / "all").run
        assert sum(worker["shards"] for worker in run["workers"]) == len(shards)
        assert [shard["sha256"] for shard in read_manifest(tmp_path / "all").shards] == [
            shard["sha256"] for shard in shards
        ]

    @card_only
    @pytest.mark.parametrize("precision", [FULL, HALF], ids=["float32", "bfloat16"])
    def test_a_model_over_all_gpus_scores_as_on_one(self, model: Path, precision: Precision) -> None:
        rows = random_rows(30, longest=60, vocabulary=200)
        rows += [(rows[0][0], completion) for _, completion in rows[1:20]]  # prompts are shared
        expected = scores(load(model, FIRST, precision), precision, rows)
        sizes = Sizes.of(find_outline(transformers, model, trust_remote_code=False).model, model)
        each = int(1.3 * sizes.frozen(precision.dtype) / GPUS) + 4 * sizes.others
        spread = load(model, FIRST, precision, spread=dict.fromkeys(range(GPUS), each))
        assert len({p.device for p in spread.parameters()}) > 1
        scorer = TransformersScorer(spread, precision)
        scorer.self_check(rows[:2])
        found = np.concatenate(scores_of(scorer, rows))
        assert (
            np.abs(found - expected).max() < CLOSE if precision.is_full else np.abs(found - expected).mean() < ROUNDED
        )

    @card_only
    def test_the_command_spreads_where_it_is_told_to(
        self, model: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        config = PrecomputeConfig(
            model=str(model),
            data=str(data),
            out=tmp_path / "all",
            backend="transformers",
            device="all",
            dtype="float32",
        )
        precompute(config)
        assert f"{GPUS} GPUs share them" in capsys.readouterr().out
        precompute(replace(config, out=tmp_path / "one", device="cuda:1"))
        assert np.abs(apart(tmp_path / "all", tmp_path / "one")).max() < CLOSE

    def test_a_sweep_has_one_worker_on_each(self, model: Path, data: Path, tmp_path: Path) -> None:
        refs = tmp_path / "refs"
        precompute(PrecomputeConfig(model=str(model), data=str(data), out=refs, backend="transformers"))
        config = SweepConfig(
            cache=refs,
            out=tmp_path / "sweep",
            search="grid",
            workers=GPUS,
            space={"beta": [0.05 * (i + 1) for i in range(2 * GPUS)]},
            train={"batch_size": 8, "max_steps": 2 if REHEARSAL else 20, "eval_fraction": 0.3, "device": DEVICE.type},
        )
        before, most, over = memory_used(), memory_used(), threading.Event()

        def watch() -> None:
            while not over.is_set():
                most[:] = [max(pair) for pair in zip(most, memory_used(), strict=True)]
                time.sleep(0.05)

        watching = threading.Thread(target=watch)
        watching.start()
        try:
            sweep(config)
        finally:
            over.set()
            watching.join()
        for number, (now, then) in enumerate(zip(most, before, strict=True)):
            assert now - then > 100 * 2**20 or REHEARSAL, (
                f"no process opened GPU {number}"
            )  # a context alone takes more


def memory_used() -> list[int]:
    return [total - free for free, total in (torch.cuda.mem_get_info(i) for i in range(GPUS))]


# Scores rows of these numbers of completion tokens with vLLM's engine in this process, and saves them.
ENGINE = """
import sys, json, numpy as np
from offline_kto.precompute.engines.vllm_scorer import VllmScorer
from offline_kto.precompute.engines.protocol import scores_of
folder, out = sys.argv[1:]
rows = np.load(out + '.rows.npz')
rows = [(rows[f'p{i}'], rows[f'c{i}']) for i in range(len(rows.files) // 2)]
scorer = VllmScorer(folder, dtype='bfloat16', max_length=4096, max_tokens=None, tokens=1, weights=1, tensor_parallel=1,
                    gpu_memory_utilization=0.3, gpus=[0], trust_remote_code=False)
np.savez(out + '.scores.npz', *scores_of(scorer, rows))
json.dump({'given_ids': scorer._given_ids, 'step': scorer._tokens}, open(out + '.json', 'w'))
"""


@vllm
class TestVllm:
    """g20: vLLM with the V2 model runner, which exists on GPUs alone."""

    def test_rows_around_the_limits_of_its_chunks(self, model: Path, tmp_path: Path) -> None:
        """vLLM projects 1,024 rows at a time, and a step holds at most so many tokens."""
        random = np.random.default_rng(0)
        rows = [
            (random.integers(3, 200, 17).astype(np.int32), random.integers(3, 200, count).astype(np.int32))
            for count in (1, 2, 1023, 1024, 1025, 3000)
        ]
        out = str(tmp_path / "rows")
        arrays = {f"{kind}{i}": one for i, row in enumerate(rows) for kind, one in zip("pc", row, strict=True)}
        np.savez(out + ".rows.npz", **arrays)
        command = [sys.executable, "-c", ENGINE, str(model), out]
        done = subprocess.run(command, capture_output=True, text=True, timeout=500, env={**os.environ}, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        found = np.load(out + ".scores.npz")
        expected = scores_of(TransformersScorer(load(model, FIRST, HALF), HALF), rows)
        facts = json.loads(Path(out + ".json").read_text())
        print(facts)
        for number, (row, theirs) in enumerate(zip(rows, expected, strict=True)):
            mine = found[f"arr_{number}"]
            assert mine.shape == row[1].shape
            print(f"{len(mine)} tokens: mean {np.abs(mine - theirs).mean():.4f}, signed {(mine - theirs).mean():.5f}")
            assert np.abs(mine - theirs).mean() < ROUNDED + 0.01 * np.abs(theirs).mean()
        assert facts["given_ids"], "the quick way to score given ids was not used"

    def test_the_command(self, model: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        """On several GPUs, one engine for each."""
        config = PrecomputeConfig(model=str(model), data=str(data), out=tmp_path / "vllm", backend="vllm")
        config = replace(config, gpu_memory_utilization=0.3)
        precompute(config)
        verify(config.out)
        assert (f"engines     {GPUS} of vLLM" in capsys.readouterr().out) == (GPUS > 1)
        print(read_manifest(config.out).scorer["difference"])
        precompute(replace(config, out=tmp_path / "transformers", backend="transformers"))
        assert np.abs(apart(config.out, tmp_path / "transformers")).mean() < ROUNDED

    @two_gpus
    def test_tensor_parallel(self, model: Path, data: Path, tmp_path: Path) -> None:
        """Score the sample for comparison on the same GPUs, not on the CPU."""
        out = tmp_path / "refs"
        precompute(
            PrecomputeConfig(
                model=str(model),
                data=str(data),
                out=out,
                backend="vllm",
                tensor_parallel=2,
                gpu_memory_utilization=0.3,
            )
        )
        verify(out)
        assert read_manifest(out).scorer["difference"]["rows"] == 24
