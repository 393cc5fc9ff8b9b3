"""Score with vLLM, in a child process (`offline_kto.precompute.engines.process`). No other file imports vLLM.

The input is token ids, so nothing is tokenized again; the output is raw log-probabilities of the given tokens. vLLM
has to generate one token per request, which is discarded.
"""

import io
import os
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
from tqdm import tqdm

from offline_kto.kto_core.errors import ModelError, in_one_line
from offline_kto.kto_core.models.memory_need import gigabytes
from offline_kto.kto_core.scoring.sequences import TokenIds
from offline_kto.precompute.engines.protocol import Listener

if TYPE_CHECKING:
    import vllm

# Tokens in one step. For log-probabilities of the prompt, vLLM holds several copies of the logits of a row's part in it,
# outside of the memory that it plans with.
_MAX_TOKENS = {"cpu": 2048, "gpu": 8192}
_LONGEST_ROW = 2048  # of which all logits may be held at once on a GPU
_MAX_SEQUENCES = 256
# Steps between two answers. Each answer wastes half a step on average.
_STEPS = 32

# Fewer tokens are scored before a GPU's kernels are compiled and its graphs, which only decoding uses, are captured.
_WORTH_COMPILING = 100_000

# Largest mean difference between two ways to get the same log-probabilities from vLLM, nats per token.
_SAME = 0.1


class VllmScorer:
    """Computes per-token log-probs of completions with vLLM.

    Args:
        model: a local folder.
        dtype: vLLM's `dtype`.
        max_length: tokens in the longest sequence.
        max_tokens: tokens in one step; None for a default.
        tokens: number of tokens that will be scored.
        weights: bytes of the model's weights, for messages.
        tensor_parallel: GPUs that share the model.
        gpu_memory_utilization: share of each GPU's memory that vLLM uses.
        gpus: numbers of the GPUs that vLLM may use; None for all.
        trust_remote_code: run code that comes with the model.

    Raises:
        ModelError: vLLM does not start.
    """

    def __init__(
        self,
        model: str,
        *,
        dtype: str,
        max_length: int,
        max_tokens: int | None,
        tokens: int,
        weights: int,
        tensor_parallel: int,
        gpu_memory_utilization: float,
        gpus: Sequence[int] | None,
        trust_remote_code: bool,
    ) -> None:
        _set_environment(tensor_parallel, gpus)
        try:
            import vllm
            from vllm.platforms import current_platform

            on_gpu = not current_platform.is_cpu()
            self._tokens = max_tokens or _default_tokens(max_length, on_gpu=on_gpu)
            self._llm = vllm.LLM(
                model=model,
                dtype=dtype,
                skip_tokenizer_init=True,
                generation_config="vllm",  # not the model's: a temperature in it would scale the logits
                logprobs_mode="raw_logprobs",
                max_model_len=max_length + 1,  # room for the token that must be generated
                max_num_batched_tokens=self._tokens,
                max_num_seqs=min(_MAX_SEQUENCES, self._tokens),
                enforce_eager=on_gpu and tokens < _WORTH_COMPILING,
                enable_chunked_prefill=True,  # otherwise a step must hold the longest row, with its logits
                tensor_parallel_size=tensor_parallel,
                gpu_memory_utilization=gpu_memory_utilization,
                # Wrong or dependent on order with prompt log-probabilities in several versions (vllm #8268, #42019).
                enable_prefix_caching=False,
                trust_remote_code=trust_remote_code,
                seed=0,
                disable_log_stats=True,
            )
        except Exception as error:
            traceback.print_exc()  # for the log
            raise ModelError(
                f"vLLM does not start: {in_one_line(error).rstrip('.')}. {_memory_advice(error, weights, tensor_parallel)}Fix "
                "that error, or use --backend transformers."
            ) from error
        config = self._llm.llm_engine.vllm_config
        may_give_ids = bool(getattr(config, "use_v2_model_runner", False)) and "prompt_logprob_start" in _fields()
        self._given_ids: bool | None = None if may_give_ids else False  # None: not known yet

    def score(self, sequences: Sequence[TokenIds], listener: Listener, *, known: frozenset[int] = frozenset()) -> None:
        """Score sequences, as in `offline_kto.precompute.engines.protocol.Scorer`.

        Raises:
            ModelError: an answer is missing or belongs to other tokens.
        """
        for part in _parts(_neighbours(sequences), sequences, self._tokens * _STEPS):
            if not known.issuperset(part):
                chosen = [sequences[i] for i in part]
                listener.on_scores(part, self._score(chosen, listener.on_tokens))

    def _score(self, sequences: Sequence[TokenIds], on_tokens: Callable[[int], None]) -> list[np.ndarray]:
        if self._given_ids is None:
            self._given_ids = self._takes_given_ids(max(sequences, key=lambda sequence: len(sequence[1])))
        try:
            return self._answers(sequences, given_ids=self._given_ids, on_tokens=on_tokens)
        except ModelError:
            raise
        except Exception as error:
            traceback.print_exc()
            raise ModelError(
                f"vLLM stopped: {in_one_line(error).rstrip('.')}. Finished scores are kept; fix that error, or use "
                "--backend transformers in another --out."
            ) from error

    def _answers(
        self, sequences: Sequence[TokenIds], *, given_ids: bool, on_tokens: Callable[[int], None]
    ) -> list[np.ndarray]:
        requests = [{"prompt_token_ids": np.concatenate(sequence).tolist()} for sequence in sequences]
        wanted = [_parameters(*sequence, given_ids=given_ids) for sequence in sequences]
        lengths = [len(request["prompt_token_ids"]) for request in requests]
        answers = self._llm.generate(requests, wanted, use_tqdm=_telling(lengths, on_tokens))
        pairs = zip(answers, sequences, strict=True)
        return [_scores(answer, *sequence, given_ids=given_ids) for answer, sequence in pairs]

    def _takes_given_ids(self, sequence: TokenIds) -> bool:
        """Return whether the engine scores the ids that are given for each row: other versions mean something else by them.

        Args:
            sequence: one that will be scored, with many completion tokens.
        """
        try:
            given, usual = (
                self._answers([sequence], given_ids=way, on_tokens=lambda tokens: None)[0] for way in (True, False)
            )
        except Exception:  # noqa: BLE001 (a request that this version refuses; the usual way reports any other error)
            traceback.print_exc()
            return False
        return given.shape == usual.shape and bool(np.abs(given - usual).mean() <= _SAME)


def _default_tokens(max_length: int, *, on_gpu: bool) -> int:
    """Return the tokens of one step: on a GPU a small step takes less time than its scheduling."""
    return _MAX_TOKENS["gpu" if on_gpu and max_length <= _LONGEST_ROW else "cpu"]


def _memory_advice(error: Exception, weights: int, tensor_parallel: int) -> str:
    """Return a sentence for an engine whose model does not fit; empty for other errors."""
    if "memory" not in str(error).lower():
        return ""
    return (
        f"The weights need {gigabytes(weights)}, and {tensor_parallel} GPU{'s' * (tensor_parallel > 1)} shared them: pass "
        f"--tensor-parallel {2 * tensor_parallel}, or another --gpu-memory-utilization. "
    )


def _set_environment(tensor_parallel: int, gpus: Sequence[int] | None) -> None:
    defaults = {
        "VLLM_LOGGING_LEVEL": "WARNING",
        "VLLM_NO_USAGE_STATS": "1",
        # A row of exactly the model's length needs room for one more token, which is never passed to the model.
        "VLLM_ALLOW_LONG_MAX_MODEL_LEN": "1",
        "VLLM_CPU_KVCACHE_SPACE": "2",
    }
    if tensor_parallel == 1:
        defaults["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # this process is already the engine's own
    for name, value in defaults.items():
        os.environ.setdefault(name, value)
    if gpus is not None:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        names = visible.split(",") if visible else None
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(names[gpu] if names else str(gpu) for gpu in gpus)


def _fields() -> tuple[str, ...]:
    import vllm

    return tuple(vllm.SamplingParams.__struct_fields__)


def _neighbours(sequences: Sequence[TokenIds]) -> list[int]:
    """Return an order with equal prompts next to each other, the longest rows first."""
    longest: dict[bytes, int] = {}
    for prompt, completion in sequences:
        key = prompt.tobytes()
        longest[key] = max(longest.get(key, 0), len(prompt) + len(completion))
    keys = [prompt.tobytes() for prompt, _ in sequences]
    return sorted(range(len(sequences)), key=lambda i: (-longest[keys[i]], keys[i]))


def _parts(order: Sequence[int], sequences: Sequence[TokenIds], tokens: int) -> Iterator[list[int]]:
    """Yield `order` in parts of at least `tokens` tokens each; the last may have fewer."""
    part: list[int] = []
    left = tokens
    for i in order:
        part.append(i)
        left -= sum(map(len, sequences[i]))
        if left <= 0:
            yield part
            part, left = [], tokens
    if part:
        yield part


def _parameters(prompt: np.ndarray, completion: np.ndarray, *, given_ids: bool) -> "vllm.SamplingParams":
    """Return parameters for greedy sampling without detokenizing, with log-probabilities of the given tokens.

    Args:
        given_ids: whether the engine can compute logits only for given ids at given rows.
    """
    import vllm

    if given_ids:
        asked: dict[str, object] = {
            "prompt_logprob_token_ids": completion[:, None].astype(np.int32),
            "prompt_logprob_start": len(prompt) - 1,
        }
    else:
        asked = {"prompt_logprobs": 0, "flat_logprobs": True}
    return vllm.SamplingParams(max_tokens=1, temperature=0.0, detokenize=False, **asked)


def _scores(answer: "vllm.RequestOutput", prompt: np.ndarray, completion: np.ndarray, *, given_ids: bool) -> np.ndarray:
    """Return float32 scores, shape (completion tokens,). Raises: ModelError: missing, or scores of other tokens."""
    if given_ids:
        scores = answer.prompt_token_id_logprobs
        if scores is None:
            raise ModelError("vLLM returned no log-probabilities for a row.")
        found = np.asarray(scores, dtype=np.float32)
        if found.shape != (len(completion), 1):
            raise ModelError(f"vLLM returned log-probabilities of shape {found.shape} for {len(completion)} tokens.")
        return found[:, 0]
    flat = answer.prompt_logprobs
    if flat is None or len(flat) != len(prompt) + len(completion):
        there = "none" if flat is None else f"{len(flat)}"
        raise ModelError(
            f"vLLM returned {there} log-probabilities for a row of {len(prompt) + len(completion)} tokens."
        )
    # The first position has no log-probability; every other one has that of its token.
    first = flat.start_indices[len(prompt)]
    ids = np.array(flat.token_ids[first:], dtype=np.int64)
    if not np.array_equal(ids, completion):
        raise ModelError("vLLM returned log-probabilities of other tokens than requested.")
    return np.array(flat.logprobs[first:], dtype=np.float32)


def _telling(lengths: Sequence[int], on_tokens: Callable[[int], None]) -> Callable[..., object]:
    """Return a factory for vLLM's progress bars: one around the submitted requests, one for finished requests."""

    def make(*iterable: object, **options: object) -> object:
        return iterable[0] if iterable else _Told(lengths, on_tokens, **options)

    return make


class _Told(tqdm):
    """A progress bar with which vLLM counts finished requests; it reports their tokens."""

    def __init__(self, lengths: Sequence[int], on_tokens: Callable[[int], None], **options: object) -> None:
        self._lengths, self._on_tokens = lengths, on_tokens
        super().__init__(**{**options, "file": io.StringIO(), "mininterval": float("inf")})

    def update(self, n: float | None = 1) -> bool | None:
        done = int(self.n)
        self._on_tokens(sum(self._lengths[done : done + int(n or 0)]))
        return super().update(n)
