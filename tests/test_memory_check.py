"""Bytes that a model needs, counted before it is loaded, and models that do not fit."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from models import FAMILIES, save_tiny, tiny_model, tiny_tokenizer

from offline_kto.kto_core.cache.manifest import read_manifest
from offline_kto.kto_core.errors import ModelError, TrainingError
from offline_kto.kto_core.models import memory_check
from offline_kto.kto_core.models.loading import load_causal_lm
from offline_kto.kto_core.models.memory_check import (
    Sizes,
    Way,
    check_fits,
    over_all_gpus,
    reporting_memory,
)
from offline_kto.kto_core.models.outline import find_outline
from offline_kto.kto_core.models.precision import Precision
from offline_kto.precompute.config import PrecomputeConfig
from offline_kto.precompute.engines.reference import Reference
from offline_kto.precompute.run import precompute
from offline_kto.train.config import TrainConfig
from offline_kto.train.model.policy import PolicyFiles
from offline_kto.train.model.training_memory import check_training_fits, training_bytes
from offline_kto.train.run.train_run import train

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
FULL, HALF = Precision(torch.float32), Precision(torch.bfloat16)
GB = 10**9

# Llama-3.1-8B: 525 million of its parameters are embeddings, and the head has as many.
EIGHT = Sizes(matrices=7_504_924_672, others=525_336_576 + 266_240)


def loaded_bytes(model: Any) -> int:
    return sum(p.numel() * p.element_size() for p in model.parameters())


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    def set_free(count: int | None, host: int | None = None) -> None:
        def found(device: torch.device) -> int | None:
            return host if host is not None and device == CPU else count

        monkeypatch.setattr(memory_check, "free_bytes", found)
        monkeypatch.setattr("offline_kto.precompute.engines.reference.free_bytes", found)
        monkeypatch.setattr("offline_kto.train.model.training_memory.free_bytes", found)

    return set_free


class TestSizes:
    @pytest.mark.parametrize("family", FAMILIES)
    @pytest.mark.parametrize("precision", [FULL, HALF], ids=["float32", "bfloat16"])
    def test_never_more_than_the_loaded_model(self, family: str, precision: Precision, tmp_path: Path) -> None:
        folder = save_tiny(tmp_path / "model", family)
        outline = find_outline(transformers, folder, trust_remote_code=False)
        sizes = Sizes.of(outline.model, folder)
        model = load_causal_lm(transformers.AutoModelForCausalLM, folder, precision=precision, device=CPU, frozen=True)
        loaded = loaded_bytes(model)
        assert sizes.parameters == sum(
            p.numel() for p in tiny_model(family, vocab_size=len(tiny_tokenizer())).parameters()
        )
        assert sizes.frozen(precision.dtype) <= loaded
        # Layers of a family's own that autocast does not cover stay in float32, as the check of each finds out.
        if precision is FULL or family in ("llama", "llama-tied", "mistral", "gemma2", "granite", "cohere"):
            assert sizes.frozen(precision.dtype) == loaded

    def test_quantised_weights_are_measured_in_their_files(self, tmp_path: Path) -> None:
        folder = save_tiny(tmp_path / "model")
        outline = find_outline(transformers, folder, trust_remote_code=False)
        text = (folder / "config.json").read_text()
        quantized = text.replace(
            "{", '{"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": true},', 1
        )
        (folder / "config.json").write_text(quantized)
        sizes = Sizes.of(outline.model, folder)
        in_files = sum(p.numel() * 4 for p in tiny_model(vocab_size=len(tiny_tokenizer())).parameters())
        assert sizes.packed == in_files  # this file is not packed, but it would be read as it is
        assert sizes.frozen(torch.bfloat16) == sizes.four_bits() == in_files

    def test_the_usual_figures(self) -> None:
        assert EIGHT.parameters == 8_030_527_488
        assert EIGHT.frozen(torch.bfloat16) == pytest.approx(17.1 * GB, rel=0.01)
        assert EIGHT.frozen(torch.float32) == 4 * EIGHT.parameters
        assert EIGHT.four_bits() == pytest.approx(4.8 * GB, rel=0.01)
        whole = TrainConfig()
        assert training_bytes(EIGHT, whole, FULL) == 16 * EIGHT.parameters
        assert training_bytes(EIGHT, whole, HALF) == 16 * EIGHT.parameters + 2 * EIGHT.matrices
        assert training_bytes(EIGHT, TrainConfig(lora_rank=16), HALF) == EIGHT.frozen(torch.bfloat16)
        eight_bit = TrainConfig(training={"optim": "adamw_bnb_8bit"})
        assert training_bytes(EIGHT, eight_bit, FULL) == 10 * EIGHT.parameters
        unknown = TrainConfig(training={"optim": "sgd"})
        assert training_bytes(EIGHT, unknown, FULL) == 8 * EIGHT.parameters


class TestRefusal:
    def test_training_that_does_not_fit_names_what_does(self, free: Callable[..., None]) -> None:
        free(79 * GB, host=200 * GB)
        with pytest.raises(TrainingError) as caught:
            check_training_fits("org/eight", EIGHT, TrainConfig(), HALF, GPU)
        assert str(caught.value) == (
            "org/eight: full fine-tuning in bfloat16 (17.9 bytes a parameter) needs 143 GB, and 79 GB are free on cuda:0. "
            "What fits: --memory lean (48.2 GB); --memory host (32.1 GB); --lora-rank 16 (17.1 GB); "
            "--lora-rank 16 on a version of the model quantised to 4 bits (4.82 GB); "
            "3 such GPUs that share the weights (accelerate launch --config_file configs/accelerate_fsdp2.yaml) (47.8 GB). "
            "Or end other processes on this GPU, if there are any."
        )

    def test_shards_are_compared_with_one_gpu(self, free: Callable[..., None]) -> None:
        """The float32 weights of eight GPUs; the host holds more than it has to."""
        free(15 * GB, host=200 * GB)
        with pytest.raises(
            TrainingError, match=r"\(2 bytes a parameter on each of 8 GPUs\) needs 16.1 GB.*--memory lean \(6.02 GB\)"
        ) as caught:
            check_training_fits("eight", EIGHT, TrainConfig(), HALF, GPU, gpus=8)
        assert "--memory host" not in str(caught.value)
        assert "11 such GPUs" in str(caught.value)
        free(17 * GB)
        check_training_fits("eight", EIGHT, TrainConfig(), HALF, GPU, gpus=8)

    def test_sharded_training_is_checked_on_its_gpu(
        self, free: Callable[..., None], cache: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The weights are first loaded on the CPU; where FSDP moves its parts to the host, nothing is certain."""
        free(1000)
        files = PolicyFiles.find(TrainConfig(cache=cache), read_manifest(cache))
        monkeypatch.setattr("offline_kto.train.model.policy.resolve_device", lambda name: GPU)
        monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
        monkeypatch.setenv("WORLD_SIZE", "2")
        with pytest.raises(TrainingError, match="on each of 2 GPUs"):
            files.load(TrainConfig(), FULL, CPU)
        monkeypatch.setenv("FSDP_OFFLOAD_PARAMS", "true")
        assert files.load(TrainConfig(), FULL, CPU).device == CPU

    def test_a_host_too_small_for_the_optimizer(
        self, free: Callable[..., None], capsys: pytest.CaptureFixture[str]
    ) -> None:
        free(79 * GB, host=64 * GB)
        with pytest.raises(TrainingError) as caught:
            check_training_fits("eight", EIGHT, TrainConfig(), HALF, GPU)
        assert "--memory host" not in str(caught.value)
        check_training_fits("eight", EIGHT, TrainConfig(memory="host"), HALF, GPU)
        said = "".join(capsys.readouterr())
        assert "--memory host: the optimizer on the host needs 96.4 GB, and 64 GB are free on this machine" in said
        check_training_fits("eight", EIGHT, TrainConfig(memory="host"), HALF, CPU)
        assert "needs 128 GB" in "".join(capsys.readouterr())

    def test_adapters_that_do_not_fit(self, free: Callable[..., None]) -> None:
        free(10 * GB)
        with pytest.raises(TrainingError, match=r"--lora-rank 8 needs 17.1 GB.*What fits: --lora-rank 16 on a version"):
            check_training_fits("eight", EIGHT, TrainConfig(lora_rank=8), HALF, GPU)

    @pytest.mark.parametrize("config", [TrainConfig(), TrainConfig(lora_rank=16)])
    def test_what_fits_is_not_refused(self, free: Callable[..., None], config: TrainConfig) -> None:
        free(training_bytes(EIGHT, config, HALF))
        check_training_fits("eight", EIGHT, config, HALF, GPU)
        free(None)  # a device whose memory is unknown
        check_training_fits("eight", EIGHT, config, HALF, GPU)

    def test_nothing_fits(self, free: Callable[..., None]) -> None:
        free(GB)
        with pytest.raises(ModelError, match=r"Use GPUs with more memory, or a smaller model\.$"):
            check_fits("eight", GPU, 16 * GB, what="scoring", instead=[Way("--other", 2 * GB)])

    def test_a_cpu_warns_alone(self, free: Callable[..., None], capsys: pytest.CaptureFixture[str]) -> None:
        free(10 * GB)
        check_fits("eight", CPU, 32 * GB, what="scoring in float32", instead=[])
        printed = capsys.readouterr()
        assert (
            "warning     eight: scoring in float32 needs 32 GB, and 10 GB are free on this machine. It may be very slow"
            in printed.out + printed.err
        )

    def test_this_machine_s_memory_is_known(self) -> None:
        count = memory_check.free_bytes(CPU)
        assert count is None or 10**8 < count < 10**14


class TestCommands:
    def test_scoring_is_refused_before_anything_is_loaded(
        self, base: Path, free: Callable[..., None], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        reference = Reference.find(PrecomputeConfig(model=str(base), dtype="float32", device="cpu"))
        object.__setattr__(reference, "device", GPU)
        monkeypatch.setattr("offline_kto.precompute.engines.reference.load_causal_lm", None)
        free(reference.weights_bytes - 1)
        with pytest.raises(
            ModelError, match=r"scoring in float32 needs .* are free on cuda:0\. What fits: --dtype bfloat16"
        ):
            reference.load()

    def test_memory_that_runs_out_is_one_message(
        self, base: Path, feedback: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def run_out(*args: object, **options: object) -> None:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

        config = PrecomputeConfig(model=str(base), data=str(feedback), out=tmp_path / "refs", device="cpu")
        monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", run_out)
        with pytest.raises(
            ModelError, match=r"out of memory while it was loaded\. Its weights need .* Tried to allocate"
        ):
            precompute(config)
        monkeypatch.undo()
        monkeypatch.setattr("offline_kto.precompute.engines.transformers_scorer.check_scoring", run_out)
        with pytest.raises(ModelError, match="out of memory while its scores were checked on two rows"):
            precompute(config)

    def test_memory_that_runs_out_in_training(
        self, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def run_out(*args: object, **options: object) -> None:
            raise torch.OutOfMemoryError("CUDA out of memory.")

        run = train(TrainConfig(cache=cache, out=tmp_path / "run", max_steps=1, save_steps=0, eval_fraction=0.3))
        monkeypatch.setattr("offline_kto.kto_core.scoring.passes.ScoringPasses.run", run_out)
        with pytest.raises(ModelError, match="out of memory while held-out rows were scored"):
            train(TrainConfig(cache=cache, evaluate_only=run))
        monkeypatch.undo()
        monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", run_out)
        with pytest.raises(ModelError, match="out of memory while it was loaded"):
            train(TrainConfig(cache=cache, out=tmp_path / "other", max_steps=1))


class TestOutOfMemory:
    @pytest.mark.parametrize(
        "error",
        [
            torch.OutOfMemoryError("CUDA out of memory. Tried"),
            RuntimeError("CUDA error: out of memory"),
            RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        ],
    )
    def test_all_kinds_are_one_message(self, error: Exception) -> None:
        with (
            pytest.raises(TrainingError, match=r"eight: out of memory while it was tested\. Its weights need 2 GB\."),
            reporting_memory("eight", CPU, 2 * GB, doing="it was tested", error=TrainingError),
        ):
            raise error

    def test_other_errors_keep_their_traceback(self) -> None:
        with pytest.raises(RuntimeError, match="shape"), reporting_memory("eight", CPU, None, doing="it was tested"):
            raise RuntimeError("shape mismatch")


def test_each_gpu_leaves_room_for_what_is_widened(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(memory_check, "free_bytes", lambda device: [40 * GB, 20 * GB][device.index])
    room = over_all_gpus(EIGHT)
    assert room == {0: int(0.85 * 40 * GB) - 2 * EIGHT.others, 1: int(0.85 * 20 * GB) - 2 * EIGHT.others}
    assert over_all_gpus(Sizes(0, 0, packed=GB)) == {0: int(0.85 * 40 * GB), 1: int(0.85 * 20 * GB)}
