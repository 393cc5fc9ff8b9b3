"""`--attention`: what is chosen where, and what is refused before a model is loaded."""

import ctypes
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from models import FAMILIES, random_rows, save_tiny, tiny_model

from offline_kto.kto_core.errors import ModelError
from offline_kto.kto_core.models import attention_choice
from offline_kto.kto_core.models.attention_choice import Attention, choose_attention
from offline_kto.kto_core.models.loading import load_causal_lm
from offline_kto.kto_core.models.precision import Precision
from offline_kto.kto_core.runtime import deprioritize_cudnn_attention
from offline_kto.kto_core.scoring import varlen_attention
from offline_kto.kto_core.scoring.attention import attention_set_to
from offline_kto.kto_core.scoring.logps import add_scoring_forward, token_logps
from offline_kto.kto_core.scoring.packing_check import measure_packing
from offline_kto.kto_core.scoring.sequences import pad_sequences
from offline_kto.kto_core.scoring.varlen_attention import VARLEN, why_not_varlen
from offline_kto.precompute.config import PrecomputeConfig
from offline_kto.precompute.run import precompute
from offline_kto.train.config import TrainConfig
from offline_kto.train.trainer.tensor_float import tf32_products, tf32_suffices

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
FULL, HALF = Precision(torch.float32), Precision(torch.bfloat16)
SWITCH = "TORCH_CUDNN_SDPA_DEPRIORITIZED"


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SWITCH, "as the test found it")  # restored afterwards


def choose(
    asked: str = "auto",
    model: Any = None,
    *,
    device: torch.device = CPU,
    precision: Precision = HALF,
    settings: dict[str, object] | None = None,
) -> Attention:
    shape = tiny_model() if model is None else model
    return choose_attention(asked, shape, settings or {}, device=device, precision=precision, library=transformers)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A GPU of the newest kind, as far as the choice asks; the list names the flash attentions that are installed."""
    installed: list[str] = []
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    for version in (2, 3):
        name = f"is_flash_attn_{version}_available"
        found = f"flash_attention_{version}"
        monkeypatch.setattr(transformers.utils, name, lambda found=found: found in installed)
    real = transformers.PreTrainedModel.set_attn_implementation

    def set_kernel(self: Any, kernel: Any, **options: Any) -> None:
        """Set the kernel that the library sets where the package is installed; its own check looks for a GPU."""
        name = kernel.get("", None) if isinstance(kernel, dict) else kernel
        if name in installed and self._supports_flash_attn:
            self.config._attn_implementation_internal = name
        else:
            real(self, kernel, **options)

    known = transformers.AttentionInterface.valid_keys
    monkeypatch.setattr(transformers.PreTrainedModel, "set_attn_implementation", set_kernel)
    monkeypatch.setattr(transformers.AttentionInterface, "valid_keys", lambda self: [*known(self), *installed])
    monkeypatch.setattr(varlen_attention, "_why_it_fails", lambda size, device: None)
    return installed


class TestAutomaticChoice:
    def test_a_cpu_keeps_the_model_s_own(self) -> None:
        found = choose()
        assert (found.kernel, found.to_set, found.packs) == ("sdpa", None, False)
        assert found.in_words == "sdpa (no flash attention on cpu), rows padded"

    def test_a_gpu_takes_flash_attention_where_it_is_installed(self, gpu: list[str]) -> None:
        gpu += ["flash_attention_2"]
        found = choose(device=CUDA)
        assert (found.to_set, found.packs) == ("flash_attention_2", True)
        assert found.in_words == "flash_attention_2 (installed), rows concatenated without padding"
        gpu += ["flash_attention_3"]
        assert choose(device=CUDA).to_set == "flash_attention_3"

    def test_a_gpu_without_flash_attention_takes_varlen(self, gpu: list[str]) -> None:
        found = choose(device=CUDA)
        assert (found.to_set, found.why, found.packs) == (VARLEN, "flash attention is not installed", True)

    def test_a_gpu_on_which_varlen_fails_keeps_the_model_s_own(
        self, gpu: list[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(varlen_attention, "_why_it_fails", lambda size, device: "it fails")
        assert choose(device=CUDA).to_set is None
        with pytest.raises(ModelError, match=f"--attention {VARLEN}: it fails"):
            choose(VARLEN, device=CUDA)

    def test_a_row_that_depends_on_the_others_of_its_pass_keeps_the_model_s_own(self, gpu: list[str]) -> None:
        model = tiny_model()
        model.config.quantization_config = {"load_in_8bit": True}
        assert choose(model=model, device=CUDA).to_set is None

    @pytest.mark.parametrize("promise", ["_supports_flash_attn", "_supports_attention_backend"])
    def test_code_that_does_not_promise_to_pass_boundaries_on_keeps_its_own(
        self, promise: str, gpu: list[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        model = tiny_model()
        monkeypatch.setattr(type(model), promise, False)
        assert choose(model=model, device=CUDA).to_set is None

    @pytest.mark.parametrize("family", FAMILIES)
    def test_varlen_is_taken_only_by_families_whose_rows_it_keeps_apart(self, family: str, gpu: list[str]) -> None:
        model = tiny_model(family)
        model.config.update({"head_dim": 8} if hasattr(model.config, "head_dim") else {})
        choice = choose(model=model, device=CUDA)
        if choice.to_set is None:
            pytest.skip(f"{family} keeps its own attention: {choice.why}")
        model = tiny_model(family)
        model.set_attn_implementation(VARLEN)
        add_scoring_forward(model)
        found = measure_packing(model, CPU, random_rows(2))
        assert found.moved <= 10 * found.moved_apart

    def test_float32_keeps_the_model_s_own(self, gpu: list[str]) -> None:
        gpu += ["flash_attention_2"]
        found = choose(device=CUDA, precision=FULL)
        assert (found.to_set, found.why) == (None, "flash attention does not compute in float32")

    def test_a_family_without_flash_attention_keeps_its_own(self, gpu: list[str]) -> None:
        gpu += ["flash_attention_2"]
        found = choose(model=tiny_model("mpt"), device=CUDA)
        assert found.to_set is None
        assert "MptForCausalLM" in found.why

    def test_a_choice_in_config_json_is_kept(self, gpu: list[str]) -> None:
        gpu += ["flash_attention_2"]
        model = tiny_model()
        model.set_attn_implementation("eager")
        found = choose(model=model, device=CUDA, settings={"attn_implementation": "eager"})
        assert (found.kernel, found.to_set, found.why) == ("eager", None, "config.json sets it")

    def test_a_kernel_of_the_hub_that_was_set_but_not_loaded_is_refused(
        self, gpu: list[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Do as transformers 5.17 to 5.19 from the second time on."""
        gpu += ["kernels-community/flash-attn3"]
        monkeypatch.setattr(transformers.AttentionInterface, "valid_keys", lambda self: ["sdpa"])
        with pytest.raises(ModelError, match="flash-attn3: LlamaForCausalLM cannot use it: it could not be loaded"):
            choose("kernels-community/flash-attn3", device=CUDA)

    def test_a_kernel_of_the_hub_is_taken_only_if_it_was_downloaded(
        self, gpu: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("KERNELS_CACHE", str(tmp_path))
        monkeypatch.setattr(attention_choice.importlib.util, "find_spec", lambda name: object())
        gpu += ["kernels-community/flash-attn2", "kernels-community/flash-attn3"]
        assert choose(device=CUDA).to_set == VARLEN
        (tmp_path / "kernels--kernels-community--flash-attn2/snapshots").mkdir(parents=True)
        assert choose(device=CUDA).to_set == "kernels-community/flash-attn2"
        (tmp_path / "models--kernels-community--flash-attn3/snapshots").mkdir(parents=True)
        found = choose(device=CUDA)
        assert (found.to_set, found.packs) == ("kernels-community/flash-attn3", True)

    @pytest.mark.parametrize(
        ("capability", "expected"),
        [((7, 5), None), ((8, 6), "flash_attention_2"), ((9, 0), "flash_attention_3"), ((10, 0), "flash_attention_2")],
    )
    def test_flash_attention_has_kernels_for_the_gpu(
        self, capability: tuple[int, int], expected: str | None, gpu: list[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Version 3 has none for GPUs after Hopper, and vLLM does not use it there either."""
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
        gpu += ["flash_attention_2", "flash_attention_3"]
        found = choose(device=CUDA)
        assert found.to_set == expected
        assert expected or found.why == "it has no kernels for this GPU (compute capability 7.5)"
        for asked in ("flash", "flash_attention_3", VARLEN) if expected is None else ():
            with pytest.raises(ModelError, match=rf"--attention {asked}: it has no kernels for this GPU"):
                choose(asked, device=CUDA)
        if capability == (10, 0):
            with pytest.raises(ModelError, match=r"capability 10\.0\); use flash attention 2"):
                choose("kernels-community/flash-attn3", device=CUDA)

    def test_the_model_is_left_as_it_was(self, gpu: list[str]) -> None:
        gpu += ["flash_attention_2"]
        model = tiny_model()
        for asked in ("auto", "eager", VARLEN):
            choose(asked, model, device=CUDA)
            assert model.config._attn_implementation == "sdpa"


class TestChoiceOfTheUser:
    @pytest.mark.parametrize("asked", ["eager", "sdpa", VARLEN])
    def test_what_runs_on_a_cpu_is_used(self, asked: str) -> None:
        found = choose(asked)
        assert (found.kernel, found.why, found.packs) == (asked, "", asked == VARLEN)
        assert found.to_set == (None if asked == "sdpa" else asked)

    def test_flash_is_whichever_is_installed(self, gpu: list[str]) -> None:
        gpu += ["flash_attention_2"]
        assert choose("flash", device=CUDA).to_set == "flash_attention_2"

    @pytest.mark.parametrize(
        ("asked", "options", "message"),
        [
            ("flash", {}, "--attention flash: it needs a CUDA device, and this run is on cpu"),
            ("flex", {}, "--attention flex: it needs a CUDA device"),
            ("kernels-community/flash-attn3", {}, "it needs a CUDA device"),
            ("flash", {"device": CUDA}, "pip install flash-attn"),
            (VARLEN, {"device": CUDA, "precision": FULL}, "does not compute in float32; pass --dtype bfloat16"),
            ("sdpaa", {}, "--attention sdpaa: LlamaForCausalLM cannot use it: .*sdpa"),
            ("nosuch", {}, r"Pass auto, sdpa, flash, flex, varlen, or a kernel on the hub \(org/name\)\.$"),
            ("", {}, "--attention: is empty. Pass auto"),
            ("someone/kernel", {}, "--attention someone/kernel: LlamaForCausalLM cannot use it"),
            ("\x1b[31m", {}, r"--attention \\x1b\[31m: "),
        ],
    )
    def test_what_cannot_be_used_is_refused_with_a_reason(
        self, asked: str, options: dict[str, Any], message: str, gpu: list[str]
    ) -> None:
        with pytest.raises(ModelError, match=message):
            choose(asked, **options)

    def test_flash_attention_in_float32_is_refused(self, gpu: list[str]) -> None:
        gpu += ["flash_attention_2"]
        with pytest.raises(ModelError, match="does not compute in float32"):
            choose("flash", device=CUDA, precision=FULL)

    @pytest.mark.parametrize("asked", ["sdpa", VARLEN])
    def test_attention_that_ignores_the_model_s_soft_cap_is_refused(self, asked: str) -> None:
        model = tiny_model("gemma2", attn_logit_softcapping=1.0)
        model.set_attn_implementation("eager")  # as `find_outline` leaves it
        with pytest.raises(ModelError, match=rf"--attention {asked}: it ignores the soft-cap .*\(gemma2\)"):
            choose(asked, model)

    def test_code_that_cannot_choose_its_attention_is_refused(self) -> None:
        model = tiny_model("mpt")
        with pytest.raises(ModelError, match="the code of MptForCausalLM does not support choosing its attention"):
            choose("sdpa", model)

    def test_attention_that_the_library_replaces_is_refused(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(transformers.PreTrainedModel, "set_attn_implementation", lambda self, kernel: None)
        with pytest.raises(ModelError, match="--attention eager: transformers uses sdpa in its place"):
            choose("eager")

    def test_varlen_is_refused_for_layers_that_it_does_not_know(self) -> None:
        why = why_not_varlen(tiny_model("llama4").config, CPU)
        assert why is not None
        assert "chunked_attention" in why
        assert why_not_varlen(tiny_model("mistral").config, CPU) is None

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"head_dim": 12}, "have 12$"),
            ({"head_dim": 264}, "a multiple of 8 up to 256, and its heads have 264$"),
            ({"qk_head_dim": 192, "v_head_dim": 128}, r"have 192 \(128 in values\)$"),
            ({"head_dim": 128, "global_head_dim": 512}, "have 512$"),
            ({"head_dim": 256}, None),
        ],
    )
    def test_varlen_is_refused_for_heads_that_the_kernel_does_not_support(
        self, settings: dict[str, int], message: str | None, gpu: list[str]
    ) -> None:
        config = tiny_model().config
        config.update(settings)
        why = why_not_varlen(config, CUDA)
        assert (why is None) == (message is None), why
        assert message is None or re.search(message, why or "")
        assert why_not_varlen(config, CPU) is None

    def test_varlen_knows_the_kernel_of_the_pytorch_that_is_installed(self) -> None:
        why = why_not_varlen(tiny_model().config, CUDA)
        assert why is None or torch.__version__ in why

    def test_the_kernel_is_tried_where_it_will_run(self) -> None:
        if torch.cuda.is_available():
            pytest.skip("the kernel may run on this machine's GPU")
        assert re.search(r"the kernel of PyTorch .* fails here \(.+\)", varlen_attention._why_it_fails(64, CUDA) or "")

    @pytest.mark.parametrize("takes_groups", [True, False])
    def test_varlen_repeats_keys_only_for_a_kernel_without_groups(
        self, takes_groups: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        seen: list[int] = []

        def kernel(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale, window_size, **groups):  # type: ignore[no-untyped-def]
            assert groups == ({"enable_gqa": True} if takes_groups else {})
            seen.append(key.shape[1])
            given = (cu_seq_q, cu_seq_k, max_q, max_k, window_size[0], scale)
            return varlen_attention._one_by_one(varlen_attention._Sequences(query, key, value, *given))

        monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", kernel)
        monkeypatch.setattr(varlen_attention, "_takes_groups", lambda: takes_groups)
        heads = (torch.randn(8, count, 16) for count in (4, 2, 2))
        ends = torch.tensor([0, 3, 8], dtype=torch.int32)
        given = varlen_attention._Sequences(*heads, ends, ends, 5, 5, before=-1, scale=None)
        torch.testing.assert_close(varlen_attention._with_kernel(given), varlen_attention._one_by_one(given))
        assert seen == [2 if takes_groups else 4]

    def test_a_refusal_comes_before_the_model_is_loaded(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        base = save_tiny(tmp_path / "base")
        feedback = tmp_path / "feedback.jsonl"
        feedback.write_text('{"prompt": "a", "completion": "b", "label": true}\n' * 2)
        monkeypatch.setattr("offline_kto.precompute.engines.reference.load_causal_lm", None)
        config = PrecomputeConfig(model=str(base), data=str(feedback), out=tmp_path / "refs", attention="flash")
        with pytest.raises(ModelError, match="needs a CUDA device"):
            precompute(config)


def test_a_loaded_model_has_the_chosen_attention(tmp_path: Path) -> None:
    base, choice = save_tiny(tmp_path / "base"), choose(VARLEN)
    options: dict[str, Any] = {"precision": FULL, "device": CPU, "frozen": True}
    found = []
    for attention in (None, choice.to_set):
        model = load_causal_lm(transformers.AutoModelForCausalLM, base, attention=attention, **options)
        assert model.config._attn_implementation == (attention or "sdpa")
        with torch.no_grad():
            found.append(token_logps(model, pad_sequences(random_rows(3))).token_logps)
    torch.testing.assert_close(*found, atol=1e-4, rtol=1e-4)


def test_another_attention_is_set_back_after_an_error() -> None:
    model = tiny_model()

    def fail() -> None:
        with attention_set_to(model, "eager"):
            assert model.config._attn_implementation == "eager"
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert model.config._attn_implementation == "sdpa"


class TestCudnn:
    def test_it_comes_last_unless_the_user_says_otherwise(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv(SWITCH)
        deprioritize_cudnn_attention()
        assert os.environ[SWITCH] == "1"
        monkeypatch.setenv(SWITCH, "0")
        deprioritize_cudnn_attention()
        assert os.environ[SWITCH] == "0"

    def test_a_choice_for_a_gpu_sets_it_and_one_for_a_cpu_does_not(
        self, monkeypatch: pytest.MonkeyPatch, gpu: list[str]
    ) -> None:
        monkeypatch.delenv(SWITCH)
        choose(device=CPU)
        assert SWITCH not in os.environ
        choose(device=CUDA)
        assert os.environ[SWITCH] == "1"

    def test_pytorch_reads_what_python_sets_after_it_was_imported(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """PyTorch reads the variable at the first attention, with getenv: it must see what `os.environ` was given."""
        monkeypatch.delenv(SWITCH, raising=False)
        get = ctypes.CDLL(None).getenv
        get.restype = ctypes.c_char_p
        assert get(SWITCH.encode()) is None
        deprioritize_cudnn_attention()
        assert get(SWITCH.encode()) == b"1"


class _Manifest:
    def __init__(self, dtype: str) -> None:
        self.reference = {"dtype": dtype}


class TestTensorFloat:
    @pytest.mark.parametrize(
        ("dtype", "precision", "device", "training", "expected"),
        [
            ("bfloat16", FULL, CUDA, {}, True),
            ("bfloat16", HALF, CUDA, {}, False),
            ("float32", FULL, CUDA, {}, False),
            ("float16", FULL, CUDA, {}, False),
            ("bfloat16", FULL, CPU, {}, False),
            ("bfloat16", FULL, CUDA, {"tf32": False}, False),
            ("bfloat16", FULL, CUDA, {"tf32": True}, False),
        ],
    )
    def test_it_suffices_only_where_the_cache_is_coarser(
        self, dtype: str, precision: Precision, device: torch.device, training: dict[str, object], expected: bool
    ) -> None:
        config, manifest = TrainConfig(training=training), _Manifest(dtype)
        assert tf32_suffices(config, precision, device, manifest) == expected  # type: ignore[arg-type]

    def test_it_ends_with_the_block_even_after_an_error(self) -> None:
        before = _products()

        def fail() -> None:
            with tf32_products(True):
                assert torch.get_float32_matmul_precision() == "high"
                raise RuntimeError

        with pytest.raises(RuntimeError):
            fail()
        assert _products() == before
        with tf32_products(False):
            assert _products() == before

    def test_a_setting_of_the_user_s_own_is_left(self) -> None:
        before = _products()
        try:
            torch.set_float32_matmul_precision("medium")
            with tf32_products(True):
                assert torch.get_float32_matmul_precision() == "medium"
            assert torch.get_float32_matmul_precision() == "medium"
        finally:
            torch.set_float32_matmul_precision("highest")
            torch.backends.cuda.matmul.fp32_precision = "none"
        assert _products() == before


def _products() -> tuple[str, str]:
    return torch.get_float32_matmul_precision(), getattr(torch.backends.cuda.matmul, "fp32_precision", "none")
