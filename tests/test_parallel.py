"""Several engines that score at the same time, and how vLLM is asked for that: without vLLM and without GPUs."""

import contextlib
import copy
import os
import signal
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from models import random_rows
from offline_kto.precompute.engines.parallel import ParallelScorer
from offline_kto.precompute.engines.shares import divide

from offline_kto.kto_core.errors import ModelError
from offline_kto.kto_core.options import as_plain
from offline_kto.precompute.config import PrecomputeConfig
from offline_kto.precompute.engines.backend import Backend, choose_backend, gpu_groups, load_transformers, vllm_engine
from offline_kto.precompute.engines.process import engine_process
from offline_kto.precompute.engines.protocol import Listener, scores_of
from offline_kto.precompute.engines.reference import Reference
from offline_kto.precompute.engines.vllm_scorer import (
    VllmScorer,
    _default_tokens,
    _memory_advice,
    _set_environment,
)

ROWS = random_rows(30)


class TestEngines:
    """Real engines of Transformers, each in a process of its own."""

    @pytest.fixture(scope="class")
    def settings(self, base: Path, feedback: Path) -> dict[str, Any]:
        config = PrecomputeConfig(model=str(base), data=str(feedback), device="cpu")
        plain = {name: value for name, value in as_plain(config).items() if name != "out"}
        return {"engine": "transformers", "options": plain, "save_to": None}

    def test_scores_are_those_of_one_engine_in_order(self, settings: dict[str, Any]) -> None:
        alone = load_transformers(Reference.find(PrecomputeConfig(**settings["options"])), ROWS)
        expected = scores_of(alone, ROWS)
        told: list[int] = []
        with ExitStack() as stack:
            engines = [stack.enter_context(engine_process(settings, name=f"engine {i}")) for i in range(2)]
            several = ParallelScorer(engines)
            found = scores_of(several, ROWS, told.append)
            known = frozenset(range(0, 30, 2))
            rest: list[int] = []
            several.score(ROWS, Listener(lambda done, scores: rest.extend(done)), known=known)
            one = scores_of(several, ROWS[:1])  # the other engine has nothing to do
            several.dismiss()
        for ours, theirs in zip(found, expected, strict=True):
            np.testing.assert_allclose(ours, theirs, atol=1e-5)
        np.testing.assert_allclose(one[0], expected[0], atol=1e-5)
        assert sum(told) == sum(len(x) + len(y) for x, y in ROWS)
        assert set(rest) == set(range(30)) - known

    def test_one_that_dies_is_named_once_with_its_log(self, settings: dict[str, Any]) -> None:
        def score_with_an_accident() -> None:
            with ExitStack() as stack:
                engines = [stack.enter_context(engine_process(settings, name=f"vLLM on GPU {i}")) for i in range(2)]
                several = ParallelScorer(engines)
                scores_of(several, ROWS)
                first, second = children()
                os.kill(second, signal.SIGKILL)
                try:
                    scores_of(several, ROWS)
                finally:
                    os.kill(first, 0)  # the other one is still there

        with pytest.raises(ModelError, match=r"^vLLM on GPU 1 ended unexpectedly.*SIGKILL.* Its log: ") as caught:
            score_with_an_accident()
        assert str(caught.value).count("Its log: ") == 1
        assert children() == []
        Path(str(caught.value).split("Its log: ")[1]).unlink()

    def test_an_error_of_one_ends_all(self, settings: dict[str, Any]) -> None:
        wrong = {**settings, "options": {**settings["options"], "model": "gone"}}

        def score() -> None:
            with ExitStack() as stack:
                engines = [stack.enter_context(engine_process(one, name="engine")) for one in (wrong, settings)]
                scores_of(ParallelScorer(engines), ROWS)

        with pytest.raises(ModelError, match=r"gone: no such model folder.* Its log: ") as caught:
            score()
        assert str(caught.value).count("Its log: ") == 1
        Path(str(caught.value).split("Its log: ")[1]).unlink()


def children() -> list[int]:
    """Engines of this process, the oldest first."""
    pid = os.getpid()
    found = [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return [child for child in found if "engines.child" in Path(f"/proc/{child}/cmdline").read_text()]


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


def test_every_engine_gets_rows() -> None:
    for engines in (2, 5):
        shares = divide(ROWS, engines)
        assert sorted(i for share in shares for i in share) == list(range(len(ROWS)))
        assert all(shares)
