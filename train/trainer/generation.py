"""Let the current policy complete prompts greedily, and leave no trace of it in the training.

Prompts of different lengths are generated together, padded on the left. Some models compute other values with such padding,
or with cached keys and values, so the log-probabilities of the generated tokens are compared with those of the scoring
forward. If they differ beyond rounding, each prompt is generated alone.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import numpy as np
import torch
import transformers
from torch import Tensor

from offline_kto.kto_core.library_types import Model
from offline_kto.kto_core.scoring.batching import micro_batches
from offline_kto.kto_core.scoring.logps import sees_whole_passes
from offline_kto.kto_core.scoring.model_code import family_of, model_code
from offline_kto.kto_core.scoring.passes import ScoringPasses
from offline_kto.train.trainer.prepared_policy import PreparedPolicy

# Padded tokens, new ones included, whose keys and values are in memory at a time: 1 GB in a model of 8B weights.
_TOGETHER = 8192


@dataclass(frozen=True)
class Completion:
    """A generated completion.

    Attributes:
        ids: the new tokens, int64; an end token is the last one.
        logps: their log-probabilities when they were generated, nats.
        ended: whether an end token was generated within the budget.
    """

    ids: np.ndarray
    logps: np.ndarray
    ended: bool


@dataclass(frozen=True)
class Generation:
    """Greedy generation, without any of the model's own sampling settings.

    Args:
        policy: the model. Every rank of a sharded run generates the same, because each token gathers all weights.
        autocast: enters the precision of training.
        ends: ids of the tokens that end a completion.
        budget: new tokens of one prompt.
        on_tokens: called with the number of new tokens after each step, for progress.
    """

    policy: PreparedPolicy
    autocast: Callable[[], AbstractContextManager[None]]
    ends: tuple[int, ...]
    budget: int
    on_tokens: Callable[[int], None] = lambda _: None

    def complete(self, prompts: Sequence[np.ndarray]) -> list[Completion]:
        """Complete every prompt; called on every rank.

        Args:
            prompts: token ids, none empty.

        Raises:
            ModelError: the model's code cannot generate.
            torch.OutOfMemoryError: for a single prompt, or on a sharded rank.
        """
        alone = [[i] for i in range(len(prompts))]
        with _undisturbed(self.policy), self.autocast():
            if len(prompts) > 1 and not sees_whole_passes(self.policy.model):
                try:
                    found = self._complete_in(self._groups(prompts), prompts)
                    if self._scored_alike(prompts, found):
                        return found
                except torch.OutOfMemoryError:
                    if self.policy.ranks.sharded:  # the other ranks would wait for this one
                        raise
                _free_cached_memory()
            return self._complete_in(alone, prompts)

    def _groups(self, prompts: Sequence[np.ndarray]) -> list[list[int]]:
        """Return which prompts are generated together: as few groups as possible, because each takes as many steps."""
        most = self.policy.widths.most
        fit = [i for i, prompt in enumerate(prompts) if len(prompt) + self.budget <= most]
        groups = micro_batches([len(prompts[i]) + self.budget for i in fit], _TOGETHER, pass_cost=1) if fit else []
        # A prompt near the model's last position has room for fewer tokens.
        others = sorted({*range(len(prompts))} - {*fit})
        return [[fit[i] for i in group] for group in groups] + [[i] for i in others]

    def _complete_in(self, groups: Sequence[Sequence[int]], prompts: Sequence[np.ndarray]) -> list[Completion]:
        found: dict[int, Completion] = {}
        model = _generating_model(self.policy.model)
        family = family_of(model)
        for group in groups:
            with model_code(type(model).__name__, f"this model family ({family}) cannot generate text"):
                completed = self._generate(model, [prompts[i] for i in group])
            found.update(zip(group, completed, strict=True))
        return [found[i] for i in range(len(prompts))]

    def _generate(self, model: Model, prompts: Sequence[np.ndarray]) -> list[Completion]:
        """Complete prompts together, padded on the left."""
        width = max(map(len, prompts))
        filler = self.ends[0] if self.ends else 0  # masked before a prompt, and ignored after an end
        ids = torch.full((len(prompts), width), filler)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, width - len(prompt) :] = torch.from_numpy(prompt.astype(np.int64))
            mask[row, width - len(prompt) :] = 1
        noted = _GreedyLogps(self.on_tokens)
        settings = transformers.GenerationConfig(
            max_new_tokens=max(1, min(self.budget, self.policy.widths.most - width)),
            do_sample=False,
            num_beams=1,
            use_cache=True,
            eos_token_id=list(self.ends) or None,
            pad_token_id=filler,
        )
        # Router losses are computed from the mask, which does not fit the single new tokens.
        extra = {"output_router_logits": False} if getattr(model.config, "output_router_logits", None) else {}
        out = model.generate(
            ids.to(self.policy.device),
            attention_mask=mask.to(self.policy.device),
            generation_config=settings,
            logits_processor=transformers.LogitsProcessorList([noted]),
            synced_gpus=self.policy.ranks.sharded and self.policy.ranks.world > 1,
            **extra,
        )
        new, logps = out[:, width:].cpu().numpy(), torch.stack(noted.steps, dim=1).cpu().numpy()
        return [self._up_to_end(*row) for row in zip(new, logps, strict=True)]

    def _up_to_end(self, ids: np.ndarray, logps: np.ndarray) -> Completion:
        at = np.flatnonzero(np.isin(ids, self.ends))
        length = int(at[0]) + 1 if len(at) else len(ids)
        return Completion(ids[:length], logps[:length], bool(len(at)))

    def _scored_alike(self, prompts: Sequence[np.ndarray], found: Sequence[Completion]) -> bool:
        """Return whether the scoring forward, without padding on the left or cached keys, gives the same log-probabilities."""
        policy = self.policy
        # Passes of their own: those of the training keep what they measured first.
        passes = ScoringPasses(
            policy.scoring_model,
            policy.device,
            max_tokens=policy.max_tokens,
            alone=not policy.ranks.sharded,
            pack=policy.packs,
            tolerance=policy.rounding,
        )
        sequences = [(prompt, one.ids.astype(np.int32)) for prompt, one in zip(prompts, found, strict=True)]
        apart = 0.0
        for done in passes.run(sequences):
            pieces = done.token_logps.float().cpu().split([len(found[i].ids) for i in done.indices])
            for i, piece in zip(done.indices, pieces, strict=True):
                apart = max(apart, float(np.abs(piece.numpy() - found[i].logps).mean()))
        # Twice, because both ways round.
        return bool(policy.ranks.least(apart <= 2 * policy.rounding))


class _GreedyLogps(transformers.LogitsProcessor):
    """Notes the log-probability of the likeliest token at each step, and changes nothing.

    Args:
        on_tokens: called with the number of rows after each step.

    Attributes:
        steps: float32 nats, shape (rows,) each.
    """

    def __init__(self, on_tokens: Callable[[int], None]) -> None:
        self.steps: list[Tensor] = []
        self._on_tokens = on_tokens

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.steps.append(scores.float().log_softmax(-1).amax(-1))
        self._on_tokens(len(scores))
        return scores


def _generating_model(model: Model) -> Model:
    """Return the model inside of PEFT's, whose layers hold the adapters."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


@contextlib.contextmanager
def _undisturbed(policy: PreparedPolicy) -> Iterator[None]:
    """Generate in eval mode, which dropout, router noise and gradient checkpointing leave alone; restore all afterwards.

    The model's sampling settings (temperature, repetition penalty) are set aside: `generate` would fill in what is not given.
    """
    model = _generating_model(policy.model)
    outermost = policy.scoring_model
    modes = [(module, module.training) for module in outermost.modules()]
    own = vars(model).get("generation_config")
    with torch.random.fork_rng([policy.device] if policy.device.type == "cuda" else []), torch.no_grad():
        outermost.eval()
        if hasattr(outermost, "unshard"):
            outermost.unshard()  # FSDP2 gathers what lies outside of the layers in PEFT's forward, which is not called
        model.generation_config = transformers.GenerationConfig()
        try:
            yield
        finally:
            del model.generation_config
            if own is not None:
                model.generation_config = own
            for module, training in modes:
                module.training = training
            if hasattr(outermost, "reshard"):
                outermost.reshard()
            _free_cached_memory()


def _free_cached_memory() -> None:
    """Give memory back, so that training finds as much as was measured."""
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
