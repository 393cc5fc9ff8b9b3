"""Which GPU a process uses, and what is loaded onto it: with a faked `torch.cuda`, since none is needed to ask for one."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from offline_kto.kto_core.errors import ModelError
from offline_kto.kto_core.models.loading import load_causal_lm
from offline_kto.kto_core.models.precision import Precision, resolve_device
from offline_kto.precompute.config import PrecomputeConfig
from offline_kto.precompute.engines.reference import ReferenceFiles


class Gpus:
    """A machine with GPUs that exist only in name.

    Attributes:
        current: the current GPU.
        free: bytes that are free on each.
        asked: names of the calls that would create a context.
    """

    def __init__(self, count: int, free: int = 80 * 10**9) -> None:
        self.count, self.current, self.free = count, 0, [free] * count
        self.asked: list[str] = []

    def set_device(self, number: int) -> None:
        self.asked.append(f"set_device {number}")
        self.current = number

    def mem_get_info(self, device: torch.device) -> tuple[int, int]:
        number = self.current if device.index is None else device.index
        return self.free[number], 80 * 10**9


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Gpus]:
    def make(count: int, **options: Any) -> Gpus:
        found = Gpus(count, **options)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: found.current)
        monkeypatch.setattr(torch.cuda, "set_device", found.set_device)
        monkeypatch.setattr(torch.cuda, "mem_get_info", found.mem_get_info)
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 0)
        monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 0)
        return found

    return make


@pytest.fixture
def rank(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, int], None]:
    def set_variables(number: int, of: int) -> None:
        for name, value in {"RANK": number, "LOCAL_RANK": number, "WORLD_SIZE": of, "LOCAL_WORLD_SIZE": of}.items():
            monkeypatch.setenv(name, str(value))

    return set_variables


class LoadedError(Exception):
    """Ends a load where transformers would begin."""


class Library:
    """Stands for `AutoModelForCausalLM`; keeps what it was asked for, and on which GPU a quantiser would load."""

    def __init__(self, gpus: Gpus) -> None:
        self.gpus = gpus

    def from_pretrained(self, folder: str, **keywords: Any) -> Any:
        self.current, self.keywords = self.gpus.current, keywords
        raise LoadedError


class TestDevice:
    @pytest.mark.parametrize("name", ["auto", "cuda"])
    def test_a_rank_uses_its_own_gpu_and_opens_no_other(
        self, gpus: Callable[..., Gpus], rank: Callable[[int, int], None], name: str
    ) -> None:
        machine = gpus(4)
        rank(3, 4)
        assert resolve_device(name) == torch.device("cuda", 3)
        assert machine.asked == []

    def test_a_single_process_leaves_the_choice_to_its_engine(self, gpus: Callable[..., Gpus]) -> None:
        machine = gpus(4)
        assert [resolve_device(name).index for name in ("auto", "cuda", "cuda:2", "all")] == [None, None, 2, 0]
        assert machine.asked == []

    def test_a_gpu_that_is_not_here(self, gpus: Callable[..., Gpus]) -> None:
        gpus(2)
        with pytest.raises(ModelError, match=r"--device cuda:2: not available here \(2 GPUs, counted from 0\)"):
            resolve_device("cuda:2")

    def test_more_ranks_than_gpus(self, gpus: Callable[..., Gpus], rank: Callable[[int, int], None]) -> None:
        gpus(2)
        rank(2, 3)
        with pytest.raises(ModelError, match="3 processes on this machine, but 2 GPUs: start fewer"):
            resolve_device("auto")

    def test_all_gpus_are_for_one_process(self, gpus: Callable[..., Gpus], rank: Callable[[int, int], None]) -> None:
        gpus(2)
        rank(0, 2)
        with pytest.raises(ModelError, match="--device all: one process uses all GPUs"):
            resolve_device("all")

    def test_all_without_a_gpu(self) -> None:
        if torch.cuda.is_available():
            pytest.skip("there is a GPU")
        with pytest.raises(ModelError, match="--device all: not available here"):
            resolve_device("all")


class TestLoading:
    def load(self, machine: Gpus, folder: Path, device: torch.device, **options: Any) -> Library:
        library = Library(machine)
        with pytest.raises(ModelError):  # `LoadedError`, as one of the library's
            load_causal_lm(library, folder, precision=Precision(torch.bfloat16), device=device, frozen=True, **options)
        return library

    @pytest.mark.parametrize("quantized", [False, True])
    def test_a_rank_of_a_reference_loads_onto_its_own_gpu(
        self,
        gpus: Callable[..., Gpus],
        rank: Callable[[int, int], None],
        base: Path,
        tmp_path: Path,
        quantized: bool,
    ) -> None:
        """A quantiser takes the current GPU: without `set_device` all ranks would load onto GPU 0."""
        folder = shutil.copytree(base, tmp_path / "model")
        if quantized:
            config = json.loads((folder / "config.json").read_text())
            config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
            (folder / "config.json").write_text(json.dumps(config))
        machine = gpus(4)
        rank(2, 4)
        files = ReferenceFiles.find(PrecomputeConfig(model=str(folder)))
        assert machine.asked == []
        library = self.load(machine, files.folder, files.device)
        assert library.current == 2
        assert library.keywords["device_map"] == {"": torch.device("cuda", 2)}

    def test_a_single_process_loads_onto_the_first(self, gpus: Callable[..., Gpus], base: Path) -> None:
        library = self.load(gpus(2), base, torch.device("cuda"))
        assert library.keywords["device_map"] == {"": torch.device("cuda", 0)}

    def test_a_gpu_that_cannot_be_used_is_one_message(
        self, gpus: Callable[..., Gpus], base: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        gpus(2)

        def busy(number: int) -> None:
            raise RuntimeError("CUDA error: all CUDA-capable devices are busy or unavailable\nCUDA kernel errors")

        monkeypatch.setattr(torch.cuda, "set_device", busy)
        with pytest.raises(
            ModelError, match=r"--device cuda:1: cannot be used \(CUDA error: all CUDA-capable .* unavail"
        ):
            load_causal_lm(None, base, precision=Precision(torch.float32), device=torch.device("cuda", 1), frozen=True)

    def test_the_cpu_keeps_the_weights_where_transformers_puts_them(
        self, gpus: Callable[..., Gpus], base: Path
    ) -> None:
        assert "device_map" not in self.load(gpus(1), base, torch.device("cpu")).keywords
