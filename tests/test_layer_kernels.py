"""Faster code for a model's layers, asked for in the `training:` table: Liger's kernels and torch.compile."""

import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import transformers
from models import tiny_model
from safetensors.torch import load_file
from stopped_runs import train_until

from offline_kto.kto_core.errors import ConfigError, TrainingError
from offline_kto.kto_core.scoring.logps import add_scoring_forward
from offline_kto.train.config import TrainConfig
from offline_kto.train.run.inputs import KeptMaterials
from offline_kto.train.run.train_run import train
from offline_kto.train.run.training_run import TrainingRun
from offline_kto.train.trainer import liger_layers
from offline_kto.train.trainer.compiled_layers import Compiling, compile_layers


@pytest.fixture
def config(cache: Path, tmp_path: Path) -> TrainConfig:
    return TrainConfig(
        cache=cache, out=tmp_path / "run", batch_size=8, max_steps=3, learning_rate=3e-3, save_steps=0, device="cpu"
    )


class TestLiger:
    @pytest.fixture
    def applied(self, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, bool]]:
        """A package that does to a model what Liger does; returns the settings that it was called with."""
        calls: list[dict[str, bool]] = []

        def apply(model: Any, fused_linear_cross_entropy: bool = True, **settings: bool) -> None:
            calls.append({"fused_linear_cross_entropy": fused_linear_cross_entropy, **settings})
            if fused_linear_cross_entropy:
                model.forward = lambda input_ids: None
            for layer in model.model.layers:
                real = layer.mlp.forward
                layer.mlp.forward = lambda hidden, real=real: calls[-1].__setitem__("ran", True) or real(hidden)

        package, patching = ModuleType("liger_kernel.transformers"), ModuleType("monkey_patch")
        package._apply_liger_kernel_to_instance = apply  # type: ignore[attr-defined]
        patching.MODEL_TYPE_TO_APPLY_LIGER_FN = {"llama": apply}  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "liger_kernel", ModuleType("liger_kernel"))
        monkeypatch.setitem(sys.modules, "liger_kernel.transformers", package)
        monkeypatch.setitem(sys.modules, "liger_kernel.transformers.monkey_patch", patching)
        for module in (liger_layers, transformers.integrations.liger):
            monkeypatch.setattr(module, "is_liger_kernel_available", lambda: True)
        return calls

    @pytest.fixture
    def on_gpu(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """The settings are made as on a GPU, and the run is on the CPU."""
        real = liger_layers.liger_settings
        monkeypatch.setattr(
            "offline_kto.train.run.arguments.liger_settings", lambda given, _: real(given, torch.device("cuda"))
        )

    @pytest.mark.usefixtures("on_gpu")
    @pytest.mark.parametrize("rank", [0, 2], ids=["all weights", "LoRA"])
    def test_layers_are_replaced_and_the_scoring_forward_is_not(
        self, config: TrainConfig, applied: list[dict[str, bool]], rank: int
    ) -> None:
        config = replace(config, lora_rank=rank)
        name = "adapter_model.safetensors" if rank else "model.safetensors"
        plain = (train(config) / name).read_bytes()
        table = {"use_liger_kernel": True, "liger_kernel_config": {"rope": False}}
        run = train(replace(config, out=config.out.with_name("liger"), training=table))
        assert applied == [
            {"rope": False, "fused_linear_cross_entropy": False, "cross_entropy": False, "ran": True},
        ]
        assert (run / name).read_bytes() == plain

    @pytest.mark.usefixtures("applied", "on_gpu")
    def test_a_loss_of_its_own_is_refused(self, config: TrainConfig) -> None:
        table = {"use_liger_kernel": True, "liger_kernel_config": {"fused_linear_cross_entropy": True}}
        with pytest.raises(ConfigError, match="fused_linear_cross_entropy would replace the losses"):
            train(replace(config, training=table))

    @pytest.mark.usefixtures("applied")
    def test_a_family_without_kernels_is_refused(self) -> None:
        liger_layers.check_liger_supports(tiny_model("llama"))
        with pytest.raises(TrainingError, match=r"no kernels for this model family \(gpt2\)"):
            liger_layers.check_liger_supports(tiny_model("gpt2"))

    @pytest.mark.usefixtures("applied")
    def test_a_cpu_is_refused(self, config: TrainConfig) -> None:
        with pytest.raises(ConfigError, match="its kernels run on GPUs only"):
            train(replace(config, training={"use_liger_kernel": True}))

    def test_without_the_package(self, config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(liger_layers, "is_liger_kernel_available", lambda: False)
        with pytest.raises(ConfigError, match="pip install liger-kernel"):
            train(replace(config, training={"use_liger_kernel": True}))

    @pytest.mark.parametrize("family", ["llama", "gemma2", "mistral", "mixtral"])
    def test_the_real_package_keeps_the_forward(self, family: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """It patches on a CPU, where its kernels cannot run."""
        pytest.importorskip("liger_kernel", reason="liger-kernel is not installed")
        modeling = sys.modules[type(tiny_model(family)).__module__]
        for name, one in vars(modeling).items():  # restores what is patched for all models
            if callable(one):
                monkeypatch.setattr(modeling, name, one)
        model = tiny_model(family)
        add_scoring_forward(model)
        liger_layers.check_liger_supports(model)
        forward, head = model.forward, model.lm_head.forward
        norm = model.model.norm.forward
        transformers.integrations.liger.apply_liger_kernel(model, liger_layers.liger_settings({}, torch.device("cuda")))
        assert model.forward is forward
        assert model.lm_head.forward is head
        assert model.model.norm.forward != norm


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(next(run.glob("*model.safetensors")))


def assert_same_weights(one: Path, other: Path, *, atol: float = 1e-6) -> None:
    first, second = weights(one), weights(other)
    assert first.keys() == second.keys()
    for name in first:
        torch.testing.assert_close(first[name], second[name], atol=atol, rtol=0)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # torch's own, while it traces
class TestCompiled:
    @pytest.fixture(autouse=True)
    def frames(self) -> Any:
        """Frames that were compiled since the test began."""
        from torch._dynamo.utils import counters

        torch._dynamo.reset()
        counters.clear()
        yield lambda: counters["frames"]["ok"]
        torch._dynamo.reset()

    @pytest.mark.slow
    @pytest.mark.parametrize(
        ("backend", "options"),
        [("eager", {"max_tokens": 100}), ("eager", {"lora_rank": 2}), ("aot_eager", {"gradient_checkpointing": True})],
    )
    def test_numbers_are_the_same(
        self, config: TrainConfig, backend: str, options: dict[str, Any], frames: Any
    ) -> None:
        config = replace(config, **options)
        plain = train(config)
        assert frames() == 0
        run = train(replace(config, out=config.out.with_name("compiled"), training={"torch_compile_backend": backend}))
        assert 0 < frames() <= 8  # not one for each shape
        assert_same_weights(plain, run)
        assert list(weights(run)) == list(weights(plain))
        folder = run if not config.lora_rank else None
        assert folder is None or transformers.AutoModelForCausalLM.from_pretrained(folder) is not None

    @pytest.mark.slow
    def test_a_compiled_run_goes_on(self, config: TrainConfig, tmp_path: Path, frames: Any) -> None:
        config = replace(config, save_steps=1, training={"torch_compile_backend": "eager"})
        whole = train(config)
        stopped = replace(config, out=tmp_path / "stopped")
        train_until(stopped, step=2)
        assert_same_weights(whole, train(replace(stopped, resume=True)))
        assert frames() > 0

    @pytest.mark.slow
    def test_trials_of_a_sweep_compile_once(self, config: TrainConfig, tmp_path: Path, frames: Any) -> None:
        kept = KeptMaterials()
        config = replace(config, training={"torch_compile_backend": "eager"})
        found = []
        for trial in range(2):
            out = tmp_path / f"{trial}"
            out.mkdir()
            run = TrainingRun.set_up(config, out, kept.data(config), kept)
            run.train()
            run.save_model(out)
            kept.take_back()
            found.append(frames())
        assert found[0] == found[1] > 0
        assert kept.loads == 1
        assert_same_weights(tmp_path / "0", tmp_path / "1", atol=0)

    def test_every_layer_of_a_deep_model_is_compiled(self, frames: Any) -> None:
        """Layers share their code: all of them together are compiled once, or twice if the process compiled before."""
        from models import random_rows

        from offline_kto.kto_core.scoring.logps import token_logps
        from offline_kto.kto_core.scoring.sequences import pad_sequences

        model = tiny_model("llama", num_hidden_layers=12)
        add_scoring_forward(model)
        batch = pad_sequences(random_rows(4))
        before = token_logps(model, batch).token_logps
        compile_layers(model, Compiling("eager"))
        torch.testing.assert_close(token_logps(model, batch).token_logps, before, atol=0, rtol=0)
        assert 0 < frames() <= 2

    @pytest.mark.parametrize(
        ("table", "message"),
        [
            ({"torch_compile_backend": "inductr"}, "torch has no backend 'inductr'"),
            ({"torch_compile": True, "torch_compile_mode": "reduce-overhead"}, "records a CUDA graph for each shape"),
        ],
    )
    def test_what_cannot_work_is_refused(self, config: TrainConfig, table: dict[str, Any], message: str) -> None:
        with pytest.raises(ConfigError, match=message):
            train(replace(config, training=table))

    def test_the_plan_names_memory_and_a_type_of_sums_without_effect(
        self, config: TrainConfig, caplog: pytest.LogCaptureFixture
    ) -> None:
        with caplog.at_level("INFO", "offline_kto"):
            train(replace(config, reduce_dtype="bfloat16", max_steps=1))
        lines = [record.getMessage() for record in caplog.records]
        assert any(line.startswith("memory      --memory full: ") and "(16 bytes a weight)" in line for line in lines)
        assert "warning     --reduce-dtype bfloat16 has no effect: one process adds no gradients over GPUs" in lines

    def test_models_that_cannot_be_compiled_are_refused(self) -> None:
        model = tiny_model("llama")
        for part in model.modules():
            part._no_split_modules = None
        with pytest.raises(TrainingError, match="does not name its layers"):
            compile_layers(model, Compiling())
        model.config.quantization_config = {"load_in_4bit": True}
        with pytest.raises(TrainingError, match="quantised weights"):
            compile_layers(model, Compiling())

    def test_a_damaged_compile_cache_is_named(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        def torn(graph: Any, inputs: Any) -> Any:
            raise ImportError(f"{tmp_path}/kernel.so: file too short")

        monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
        torch._dynamo.reset()
        model = tiny_model("llama")
        compile_layers(model, Compiling(torn))  # type: ignore[arg-type]
        message = rf"compile cache is damaged.*file too short.*Delete the folder {tmp_path} "
        with pytest.raises(TrainingError, match=message):
            model(torch.ones(1, 4, dtype=torch.long), use_cache=False)

    def test_a_backend_that_fails_is_one_message(self, config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
        def broken(graph: Any, inputs: Any) -> Any:
            raise RuntimeError("no compiler here")

        real = Compiling.of
        monkeypatch.setattr(Compiling, "of", lambda table: real(table) and Compiling(broken))  # type: ignore[arg-type]
        with pytest.raises(TrainingError, match=r"cannot compile this model's layers: .*no compiler here"):
            train(replace(config, training={"torch_compile": True}))
