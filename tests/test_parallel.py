"""Which GPUs engines and workers get, and how vLLM is asked: without vLLM and without GPUs."""

import contextlib
import copy
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from models import random_rows

from offline_kto.kto_core.errors import ConfigError, ModelError
from offline_kto.precompute.config import PrecomputeConfig
from offline_kto.precompute.engines.backend import Backend, choose_backend, gpu_groups, vllm_engine
from offline_kto.precompute.engines.reference import Reference
from offline_kto.precompute.engines.vllm_scorer import (
    VllmScorer,
    _default_tokens,
    _memory_advice,
    _set_environment,
)
from offline_kto.precompute.local_workers import worker_gpus

ROWS = random_rows(30)


class TestGroups:
    @pytest.mark.parametrize(
        ("count", "size", "expected"),
        [
            (1, 1, [None]),
            (3, 1, [[0], [1], [2]]),
            (2, 2, [None]),
            (3, 2, [[0, 1]]),
            (8, 4, [[0, 1, 2, 3], [4, 5, 6, 7]]),
        ],
    )
    def test_one_engine_for_each_gpu_or_group(
        self, monkeypatch: pytest.MonkeyPatch, count: int, size: int, expected: list[Any]
    ) -> None:
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        assert gpu_groups(PrecomputeConfig(tensor_parallel=size), torch.device("cuda")) == expected

    def test_a_gpu_that_was_named_and_a_cpu(self) -> None:
        assert gpu_groups(PrecomputeConfig(), torch.device("cuda", 2)) == [[2]]
        assert gpu_groups(PrecomputeConfig(tensor_parallel=2), torch.device("cpu")) == [None]

    def test_too_few(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
        with pytest.raises(ModelError, match="--tensor-parallel 4: there are 2 GPUs here"):
            gpu_groups(PrecomputeConfig(tensor_parallel=4), torch.device("cuda"))
        with pytest.raises(ModelError, match="--tensor-parallel 2: --device cuda:1 names a single GPU"):
            gpu_groups(PrecomputeConfig(tensor_parallel=2), torch.device("cuda", 1))

    @pytest.mark.parametrize(
        ("options", "device", "expected"),
        [
            ({}, "cuda", [[0], [1], [2], [3]]),
            ({"workers": 2}, "cuda", [[0], [1]]),
            ({"backend": "vllm", "tensor_parallel": 2}, "cuda", [[0, 1], [2, 3]]),
            ({"device": "cuda:1"}, "cuda:1", [None]),
            ({"device": "all"}, "cuda", [None]),
            ({}, "cpu", [None]),
            ({"workers": 3}, "cpu", [None] * 3),
        ],
    )
    def test_a_worker_for_each_gpu_or_group(
        self, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], device: str, expected: list[Any]
    ) -> None:
        assert self.workers(monkeypatch, PrecomputeConfig(**options), device) == expected

    @pytest.mark.parametrize(
        ("options", "device", "message"),
        [
            ({"workers": 5}, "cuda", r"--workers 5: there are 4 GPUs here\. Leave it out"),
            ({"workers": 3, "backend": "vllm", "tensor_parallel": 2}, "cuda", "4 GPUs here, and each worker takes 2"),
            ({"workers": 2, "device": "cuda:1"}, "cuda:1", "--workers 2: --device cuda:1 names one GPU"),
            ({"workers": 2, "device": "all"}, "cuda", "--workers 2: all GPUs share the model"),
        ],
    )
    def test_more_workers_than_there_can_be(
        self, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], device: str, message: str
    ) -> None:
        with pytest.raises(ConfigError, match=message):
            self.workers(monkeypatch, PrecomputeConfig(**options), device)

    @staticmethod
    def workers(monkeypatch: pytest.MonkeyPatch, config: PrecomputeConfig, device: str) -> list[Any]:
        """Return the GPUs of workers on a machine with four of them, if the model fits on one."""
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
        reference: Any = SimpleNamespace(device=torch.device(device), needs_all_gpus=config.device == "all")
        return worker_gpus(config, reference, Backend(config.backend.replace("auto", "transformers")))

    def test_all_gpus_for_one_model_are_of_transformers(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr("offline_kto.precompute.engines.backend._vllm_version", lambda: "0.32.0")
        assert choose_backend(PrecomputeConfig(device="all")) == Backend("transformers", "--device all")
        with pytest.raises(ModelError, match=r"--device all is for Transformers.*--tensor-parallel N"):
            choose_backend(PrecomputeConfig(device="all", backend="vllm"))


class StartedError(Exception):
    """Ends where the first process would start."""


@pytest.mark.parametrize(("kind", "device", "count"), [("cuda", "all", 24), ("cpu", "cpu", 8)])
def test_the_sample_of_a_model_larger_than_one_gpu_is_scored_on_all(
    base: Path, monkeypatch: pytest.MonkeyPatch, kind: str, device: str, count: int
) -> None:
    """On the CPU it took hours for the models that need it."""
    asked: list[Any] = []

    class Engine:
        def score(self, sequences: Any, *rest: Any) -> None:
            asked.append(len(sequences))
            raise StartedError

    @contextlib.contextmanager
    def engine_process(settings: Any, name: str) -> Any:
        asked.append(settings["options"]["device"])
        yield Engine()

    config = PrecomputeConfig(model=str(base), data="unused", device="cpu", backend="vllm", tensor_parallel=2)
    reference = copy.copy(Reference.find(config))
    object.__setattr__(reference, "device", torch.device(kind))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr("offline_kto.precompute.engines.backend.engine_process", engine_process)
    with pytest.raises(StartedError), vllm_engine(reference, ROWS[:24], Path("unused"), tokens=1):
        pass
    assert asked == [device, count]


class TestVllm:
    @pytest.mark.parametrize(
        ("visible", "expected"), [(None, "2,3"), ("4,5,6,7", "6,7"), ("a,b,GPU-c,GPU-d", "GPU-c,GPU-d")]
    )
    def test_an_engine_sees_its_gpus_alone(
        self, monkeypatch: pytest.MonkeyPatch, visible: str | None, expected: str
    ) -> None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        if visible is not None:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        _set_environment(2, [2, 3])
        assert os.environ["CUDA_VISIBLE_DEVICES"] == expected

    def test_steps_are_larger_on_a_gpu_unless_rows_are_long(self) -> None:
        assert _default_tokens(1024, on_gpu=True) == 8192
        assert _default_tokens(8192, on_gpu=True) == _default_tokens(1024, on_gpu=False) == 2048

    def test_a_model_that_does_not_fit_is_told_what_to_do(self) -> None:
        said = _memory_advice(ValueError("No available memory for the cache blocks."), 16 * 10**9, 1)
        assert said.startswith("The weights need 16 GB, and 1 GPU shared them: pass --tensor-parallel 2")
        assert _memory_advice(ValueError("no kernel"), 16 * 10**9, 1) == ""

    @staticmethod
    def engine(given: Any) -> VllmScorer:
        """An engine whose usual answers are right; `given` makes the answer to given ids."""

        def generate(requests: Any, wanted: Any, use_tqdm: Any) -> list[Any]:
            found = []
            for request, parameters in zip(requests, wanted, strict=True):
                ids = request["prompt_token_ids"]
                scores = [-0.5 * i for i in range(len(ids))]
                start = parameters["start"]
                if parameters["given"]:
                    found.append(SimpleNamespace(prompt_token_id_logprobs=given(np.array(scores[start:])[:, None])))
                else:
                    found.append(SimpleNamespace(prompt_logprobs=Flat(ids, scores)))
            return found

        scorer = VllmScorer.__new__(VllmScorer)
        scorer._llm = SimpleNamespace(generate=generate)
        scorer._given_ids = None
        return scorer

    @pytest.fixture(autouse=True)
    def parameters(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(
            "offline_kto.precompute.engines.vllm_scorer._parameters",
            lambda prompt, completion, given_ids: {"given": given_ids, "start": len(prompt)},
        )

    @pytest.mark.parametrize(
        ("given", "understood"),
        [
            (lambda right: right, True),
            (lambda right: right[:, 0], False),  # one list of ids for the whole request
            (lambda right: np.repeat(right, 3, axis=1), False),
            (lambda right: right[::-1] - 1, False),  # of other positions
            (lambda right: None, False),
            (lambda right: 1 / 0, False),
        ],
        ids=["rows", "request", "columns", "positions", "none", "refused"],
    )
    def test_given_ids_are_used_only_where_they_mean_the_same(
        self, given: Any, understood: bool, capsys: pytest.CaptureFixture[str]
    ) -> None:
        scorer = self.engine(given)
        found = scorer._score(ROWS, lambda tokens: None)
        assert scorer._given_ids is understood
        for scores, (prompt, completion) in zip(found, ROWS, strict=True):
            np.testing.assert_allclose(scores, [-0.5 * (len(prompt) + i) for i in range(len(completion))])


class Flat:
    """vLLM's flat log-probabilities of one request."""

    def __init__(self, token_ids: list[int], logprobs: list[float]) -> None:
        self.token_ids, self.logprobs, self.start_indices = token_ids, logprobs, range(len(token_ids))

    def __len__(self) -> int:
        return len(self.token_ids)
