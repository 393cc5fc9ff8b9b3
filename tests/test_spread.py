"""A model over several devices scores as on one, and weights read straight onto a device are those read otherwise."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
import transformers
from fake_devices import FIRST, SECOND, Devices, Placed, spread
from models import random_rows, save_tiny, tiny_model
from torch import nn

from offline_kto.kto_core.errors import ModelError
from offline_kto.kto_core.models import loading
from offline_kto.kto_core.models.loading import load_causal_lm
from offline_kto.kto_core.models.precision import Precision
from offline_kto.kto_core.scoring import logps
from offline_kto.kto_core.scoring.logps import add_scoring_forward, check_scoring, token_logps
from offline_kto.kto_core.scoring.output_layer import Head
from offline_kto.kto_core.scoring.sequences import pad_sequences
from offline_kto.kto_core.scoring.shared_prompts import share_prompts
from offline_kto.precompute.config import PrecomputeConfig
from offline_kto.precompute.engines import reference as reference_module
from offline_kto.precompute.engines.protocol import scores_of
from offline_kto.precompute.engines.reference import Reference
from offline_kto.precompute.engines.transformers_scorer import TransformersScorer

CPU = torch.device("cpu")
FULL, HALF = Precision(torch.float32), Precision(torch.bfloat16)
ROWS = random_rows(12)
BATCHES = {
    "padded": pad_sequences(ROWS),
    "shared": share_prompts([[ROWS[0], (ROWS[0][0], ROWS[1][1])], [ROWS[2]]], 64),
}


def halves(model: Any) -> dict[str, torch.device]:
    """Place the first half of the layers, with embeddings, before the second, with the last norm and the head."""
    names = {id(module): name for name, module in model.named_modules()}
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    places = {names[id(model.get_output_embeddings())]: FIRST if tied else SECOND}
    for name, module in model.base_model.named_children():
        full = names[id(module)]
        if isinstance(module, nn.ModuleList):
            places |= {f"{full}.{i}": SECOND if 2 * i >= len(module) else FIRST for i in range(len(module))}
        else:
            places[full] = SECOND if "norm" in name or name == "ln_f" else FIRST
    return places


class TestTwoDevices:
    @pytest.fixture(autouse=True)
    def plain_head(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """The head runs on one device; autocast, which it asks about, does not know this one."""

        def selected(hidden: torch.Tensor, targets: torch.Tensor, head: Head) -> torch.Tensor:
            return (hidden @ head.weight.T).log_softmax(-1).gather(1, targets[:, None])[:, 0]

        monkeypatch.setattr(logps, "selected_logps", selected)
        monkeypatch.setattr(torch, "is_autocast_enabled", lambda kind=None: False)

    @pytest.fixture(params=["llama", "llama-tied", "gpt2", "opt"])
    def models(self, request: pytest.FixtureRequest) -> tuple[Any, Any]:
        """One on the CPU, and the same one on two devices."""
        whole = tiny_model(request.param).requires_grad_(False)
        parts = tiny_model(request.param).requires_grad_(False)
        spread(parts, halves(parts))
        for model in (whole, parts):
            add_scoring_forward(model)
        return whole, parts

    @pytest.mark.parametrize("kind", BATCHES)
    def test_scores_are_those_of_one_device(self, models: tuple[Any, Any], kind: str) -> None:
        whole, parts = models
        with torch.no_grad():
            expected = token_logps(whole, BATCHES[kind]).token_logps
            with Devices():
                found = token_logps(parts, BATCHES[kind].to(FIRST)).token_logps
        assert found.device == FIRST  # where the inputs are
        assert isinstance(found, Placed)
        torch.testing.assert_close(found.inner, expected, atol=1e-5, rtol=0)

    def test_the_self_check_runs(self, models: tuple[Any, Any]) -> None:
        with Devices():
            assert check_scoring(models[1], ROWS[:2], tolerance=1e-3) < 1e-4

    def test_without_hooks_the_devices_are_noticed(self) -> None:
        """Else the tests above could not fail."""
        model = tiny_model("llama").requires_grad_(False)
        spread(model, halves(model))
        accelerate.hooks.remove_hook_from_submodules(model)
        add_scoring_forward(model)
        with Devices(), pytest.raises(RuntimeError, match="tensors on"):
            token_logps(model, BATCHES["padded"].to(FIRST))


class TestHooks:
    """accelerate's own hooks, on the one device there is."""

    @pytest.mark.parametrize("family", ["llama", "llama-tied", "gpt2", "gemma2", "mixtral"])
    def test_scores_are_bit_equal(self, family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        folder = save_tiny(tmp_path / "model", family)
        plain = load(folder, HALF)
        real = loading._places

        def all_here(*args: object, **options: object) -> dict[str, object]:
            assert real(*args, **options)["device_map"] == "auto"  # type: ignore[arg-type]
            return {}

        def dispatched(*args: Any, **options: Any) -> Any:
            model, info = transformers.AutoModelForCausalLM.from_pretrained(*args, **options)
            where = {name: "cpu" for name, _ in model.named_children()}
            return accelerate.dispatch_model(model, where, force_hooks=True), info

        monkeypatch.setattr(loading, "_places", all_here)
        library = type("Library", (), {"from_pretrained": staticmethod(dispatched)})
        hooked = load(folder, HALF, library=library, spread={0: 10**9, 1: 10**9})
        assert any(hasattr(module, "_hf_hook") for module in hooked.modules())
        rows = random_rows(12)
        for one, other in zip(*(scores_of(TransformersScorer(m, HALF), rows) for m in (plain, hooked)), strict=True):
            assert (one == other).all()


def load(folder: Path, precision: Precision, *, library: Any = None, frozen: bool = True, **options: Any) -> Any:
    library = transformers.AutoModelForCausalLM if library is None else library
    model = load_causal_lm(library, folder, precision=precision, device=CPU, frozen=frozen, **options)
    return model.eval()


class TestStraightOntoTheDevice:
    @pytest.mark.parametrize("family", ["llama", "llama-tied", "gpt2", "gemma2", "mixtral", "opt"])
    @pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize(("precision", "frozen"), [(FULL, True), (HALF, True), (HALF, False)])
    def test_weights_types_and_ties_are_the_same(
        self,
        family: str,
        stored: torch.dtype,
        precision: Precision,
        frozen: bool,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        folder = tmp_path / "model"
        save_tiny(folder, family)
        if stored == torch.bfloat16:
            transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=stored).save_pretrained(folder)
        plain = load(folder, precision, frozen=frozen)
        monkeypatch.setattr(loading, "_places", lambda *args, **options: {"device_map": {"": CPU}})
        straight = load(folder, precision, frozen=frozen)
        ours, theirs = (dict(model.named_parameters(remove_duplicate=False)) for model in (straight, plain))
        assert ours.keys() == theirs.keys()
        for name, weight in theirs.items():
            assert ours[name].dtype == weight.dtype, name
            assert torch.equal(ours[name], weight), name
            assert ours[name].requires_grad == weight.requires_grad, name
        assert sharing(straight) == sharing(plain)
        for (name, one), (_, other) in zip(plain.named_buffers(), straight.named_buffers(), strict=True):
            assert torch.equal(one, other), name
        # What libraries take as a sign that a model was placed by hand.
        assert not hasattr(straight, "hf_device_map")
        assert not any(hasattr(module, "_hf_hook") for module in straight.modules())


def sharing(model: Any) -> list[list[str]]:
    """Names of the parameters that are one tensor."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return sorted(found for found in names.values() if len(found) > 1)


class TestChoice:
    """When a model is spread, with made-up free bytes."""

    @pytest.fixture
    def reference(self, base: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
        def make(device: str, free: list[int], **options: Any) -> Any:
            found = Reference.find(PrecomputeConfig(model=str(base), device="cpu", dtype="float32", **options))
            found = copy.copy(found)
            object.__setattr__(found, "config", PrecomputeConfig(model=str(base), device=device, **options))
            object.__setattr__(found, "device", torch.device("cuda", 0))
            monkeypatch.setattr(torch.cuda, "device_count", lambda: len(free))
            for where in (
                "offline_kto.kto_core.models.memory_need.free_bytes",
                f"{reference_module.__name__}.free_bytes",
            ):
                monkeypatch.setattr(where, lambda device: free[device.index or 0])
            return found

        return make

    def test_auto_spreads_what_fits_on_all_alone(
        self, reference: Callable[..., Any], capsys: pytest.CaptureFixture[str]
    ) -> None:
        need = reference("auto", [1]).weights_bytes
        room = reference("auto", [need // 2 + 20_000] * 4)._spread()
        assert list(room) == [0, 1, 2, 3]
        assert sum(room.values()) >= need
        assert "4 GPUs share them" in capsys.readouterr().out
        assert reference("auto", [need] * 4)._spread() is None  # it fits on one
        assert list(reference("all", [2 * need] * 2)._spread()) == [0, 1]

    def test_what_fits_nowhere_is_refused(self, reference: Callable[..., Any]) -> None:
        need = reference("auto", [1]).weights_bytes
        with pytest.raises(ModelError, match=r"scoring in float32 needs .* are free on 2 GPUs"):
            reference("all", [need // 8] * 2)._spread()

    def test_a_named_gpu_is_used_alone(self, reference: Callable[..., Any]) -> None:
        need = reference("auto", [1]).weights_bytes
        with pytest.raises(ModelError, match=r"are free on cuda:0\. What fits: .*--device all without torchrun"):
            reference("cuda", [int(0.7 * need), need])._spread()
