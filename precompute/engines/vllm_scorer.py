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
from offline_kto.kto_core.scoring.sequences import TokenIds
from offline_kto.precompute.engines.protocol import OnScores

if TYPE_CHECKING:
    import vllm

# Tokens in one step. For log-probabilities of the prompt, vLLM holds several copies of the logits of all of them.
_MAX_TOKENS = 2048
_MAX_SEQUENCES = 256
# Steps between two answers. Each answer wastes half a step on average.
_STEPS = 32


class VllmScorer:
    """Computes per-token log-probs of completions with vLLM.

    Args:
        model: a local folder.
        dtype: vLLM's `dtype`.
        max_length: tokens in the longest sequence.
        max_tokens: tokens in one step; None for a default.
        tensor_parallel: GPUs that share the model.
        gpu_memory_utilization: share of each GPU's memory that vLLM uses.
        gpu: index of the only GPU that vLLM may use; None for all.
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
        tensor_parallel: int,
        gpu_memory_utilization: float,
        gpu: int | None,
        trust_remote_code: bool,
    ) -> None:
        _set_environment(tensor_parallel, gpu)
        self._tokens = tokens = max_tokens or _MAX_TOKENS
        try:
            import vllm

            self._llm = vllm.LLM(
                model=model,
                dtype=dtype,
                skip_tokenizer_init=True,
                generation_config="vllm",  # not the model's: a temperature in it would scale the logits
                logprobs_mode="raw_logprobs",
                max_model_len=max_length + 1,  # room for the token that must be generated
                max_num_batched_tokens=tokens,
                max_num_seqs=min(_MAX_SEQUENCES, tokens),
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
                f"vLLM does not start: {in_one_line(error).rstrip('.')}. Fix that error, or use --backend transformers."
            ) from error
        config = self._llm.llm_engine.vllm_config
        self._given_ids = bool(getattr(config, "use_v2_model_runner", False)) and "prompt_logprob_start" in _fields()

    def score(
        self,
        sequences: Sequence[TokenIds],
        *,
        known: frozenset[int] = frozenset(),
        on_scores: OnScores,
        on_tokens: Callable[[int], None],
    ) -> None:
        """Score sequences, as in `offline_kto.precompute.engines.protocol.Scorer`.

        Raises:
            ModelError: an answer is missing or belongs to other tokens.
        """
        for part in _parts(_neighbours(sequences), sequences, self._tokens * _STEPS):
            if not known.issuperset(part):
                chosen = [sequences[i] for i in part]
                on_scores(part, self._score(chosen, on_tokens))

    def _score(self, sequences: Sequence[TokenIds], on_tokens: Callable[[int], None]) -> list[np.ndarray]:
        requests = [{"prompt_token_ids": np.concatenate(sequence).tolist()} for sequence in sequences]
        wanted = [_parameters(*sequence, given_ids=self._given_ids) for sequence in sequences]
        lengths = [len(request["prompt_token_ids"]) for request in requests]
        try:
            answers = self._llm.generate(requests, wanted, use_tqdm=_telling(lengths, on_tokens))
        except Exception as error:
            traceback.print_exc()
            raise ModelError(
                f"vLLM stopped: {in_one_line(error).rstrip('.')}. Finished scores are kept; fix that error, or use "
                "--backend transformers in another --out."
            ) from error
        pairs = zip(answers, sequences, strict=True)
        return [_scores(answer, *sequence, given_ids=self._given_ids) for answer, sequence in pairs]


def _set_environment(tensor_parallel: int, gpu: int | None) -> None:
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
    if gpu is not None:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        os.environ["CUDA_VISIBLE_DEVICES"] = visible.split(",")[gpu] if visible else str(gpu)


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
        return np.asarray(scores, dtype=np.float32)[:, 0]
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
