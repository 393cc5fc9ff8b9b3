"""Complete held-out prompts with the policy, before and after training, and write samples.jsonl."""

import dataclasses
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from accelerate.utils import broadcast_object_list

from offline_kto.kto_core.console import tell
from offline_kto.kto_core.equal_ids import IdIndex
from offline_kto.kto_core.errors import KTOError, in_one_line
from offline_kto.kto_core.feedback.quoting import counted
from offline_kto.kto_core.hashing import hex_ids
from offline_kto.kto_core.library_types import Model, Tokenizer
from offline_kto.kto_core.progress import Progress
from offline_kto.kto_core.scoring.model_code import model_code
from offline_kto.train.data.cache_rows import RowKey
from offline_kto.train.data.held_out import HeldOutRows
from offline_kto.train.data.row_ids import as_ids, id_array_of
from offline_kto.train.run_records import SampleRecord
from offline_kto.train.samples_file import MOST_NEW_TOKENS, SAMPLES, read_samples, write_samples
from offline_kto.train.trainer.generation import Completion, Generation
from offline_kto.train.trainer.kto_trainer import KTOTrainer

# Held-out completions that are read at most, to find how long they are, and how they end.
_ROWS_READ = 64


class HeldOutSamples:
    """The samples of a run: the same held-out prompts, completed greedily at several steps.

    Every method is called on every rank; the first one writes.

    Args:
        folder: the run folder.
        trainer: of the run, with held-out rows.
        tokenizer: the run's.
        count: number of prompts, where the file names none yet.
        name: of the file in `folder`.

    Attributes:
        path: the file.
        seconds: spent so far.
    """

    def __init__(
        self, folder: Path, trainer: KTOTrainer, tokenizer: Tokenizer, count: int, *, name: str = SAMPLES
    ) -> None:
        assert trainer.held_out is not None
        self.folder, self.trainer, self.tokenizer, self.count, self.name = folder, trainer, tokenizer, count, name
        self.path = folder / name
        self.seconds = 0.0
        self._prompts: dict[str, np.ndarray] = {}
        self._records: list[SampleRecord] = []
        self._generation: Generation | None = None

    @property
    def steps(self) -> list[int]:
        """The steps that there are samples of, on the rank that writes."""
        return sorted({record["step"] for record in self._records})

    def begin(self, *, until: int | None) -> None:
        """Choose the prompts; those of the file are kept, so that a resumed run continues them.

        Args:
            until: the last step whose samples are kept; None to begin anew.
        """
        trainer = self.trainer
        if trainer.is_deepspeed_enabled:
            self._give_up("not made under DeepSpeed, whose ranks would have to gather all weights for each token")
            return
        held_out = trainer.held_out
        assert held_out is not None
        firsts = FirstRows(held_out)
        known: list[list[str]] = [[]]
        if trainer.is_world_process_zero() and until is not None:
            found = [one for one in read_samples(self.folder, self.name) if one["prompt_id"] in firsts]
            self._records = [one for one in found if one["step"] <= until]
            known = [list(dict.fromkeys(one["prompt_id"] for one in self._records))]
            if self.path.exists():
                write_samples(self.path, self._records)
        if trainer.policy.ranks.world > 1:
            broadcast_object_list(known)  # the other ranks may not see the folder
        fewer = len(known[0]) < min(self.count, len(firsts))
        if known[0] and fewer and trainer.is_world_process_zero():
            tell(
                f"samples     {self.path} has {counted(len(known[0]), 'prompt')}, which are kept; without it, {self.count} are chosen"
            )
        # In the order of their hashes: runs with the same held-out rows have the same samples, whatever their seed.
        chosen = known[0] or firsts.names(self.count)
        self._prompts = {name: held_out.cache[RowKey(firsts.of(name), 0)].matched.prompt_ids for name in chosen}
        self._generation = self._prepared(held_out)

    def make(self, step: int) -> None:
        """Complete the prompts with the current model, and replace the samples of this step and of later ones.

        A model that cannot generate, or too little memory, is logged; neither ends a run.
        """
        if self._generation is None:
            return
        started = time.monotonic()
        try:
            completions = self._complete(self._generation)
            with model_code(type(self.tokenizer).__name__, "the tokenizer cannot decode the samples"):
                new = [self._record(step, *one) for one in zip(self._prompts, completions, strict=True)]
        except (KTOError, torch.OutOfMemoryError) as error:
            self._give_up(in_one_line(error))
            return
        finally:
            self.seconds += time.monotonic() - started
        if self.trainer.is_world_process_zero():
            self._records = [one for one in self._records if one["step"] < step] + new
            write_samples(self.path, self._records)

    def _complete(self, generation: Generation) -> list[Completion]:
        prompts = list(self._prompts.values())
        if not self.trainer.is_world_process_zero():
            return generation.complete(prompts)
        with Progress("sampling", len(prompts) * generation.budget, "tokens") as progress:
            completions = dataclasses.replace(generation, on_tokens=progress.add).complete(prompts)
            progress.add(max(0, progress.total - progress.done))  # most prompts end before the budget
        return completions

    def line(self) -> list[str]:
        """Return a line about the samples for the console; none if a message has said why there are no samples."""
        if self._generation is None or not self.steps:
            return []
        prompts = counted(len(self._prompts), "held-out prompt")
        when = "before and after training" if self.steps[0] == 0 else "after training"
        return [f"samples     {prompts} {when}, in {self.seconds:.1f} s: {self.path}"]

    def _give_up(self, why: str) -> None:
        self._generation = None
        if self.trainer.is_world_process_zero():
            tell(f"samples     none: {why}")

    def _prepared(self, held_out: HeldOutRows) -> Generation:
        every = held_out.indices
        rows = [held_out.cache[RowKey(i, 0)] for i in every[:: -(-len(every) // _ROWS_READ)].tolist()]
        completions = [row.matched.completion_ids for row in rows]
        policy = self.trainer.policy
        return Generation(
            policy,
            self.trainer.accelerator.autocast,
            ends=end_tokens(self.tokenizer, policy.model, completions),
            budget=min(MOST_NEW_TOKENS, max(map(len, completions))),
        )

    def _record(self, step: int, prompt_id: str, completion: Completion) -> SampleRecord:
        kept = completion.ids[:-1] if completion.ended else completion.ids
        return {
            "step": step,
            "prompt_id": prompt_id,
            "prompt": self._text(self._prompts[prompt_id]),
            "completion": self._text(kept),
            "ended": completion.ended,
            "tokens": len(completion.ids),
        }

    def _text(self, ids: np.ndarray) -> str:
        return str(self.tokenizer.decode(ids.tolist(), skip_special_tokens=False, clean_up_tokenization_spaces=False))


class FirstRows:
    """The first held-out row of each prompt."""

    def __init__(self, held_out: HeldOutRows) -> None:
        ids = held_out.cache.prompt_ids
        codes, first = np.unique(ids.codes[held_out.indices], return_index=True)
        self._ids, self._rows = ids.distinct[codes], held_out.indices[first]
        self._index = IdIndex(self._ids, self._rows)

    def __len__(self) -> int:
        return len(self._rows)

    def __contains__(self, name: object) -> bool:
        return self.of(str(name)) >= 0

    def of(self, name: str) -> int:
        """Return the first row of the prompt with an id; -1 if it is not held out."""
        return int(self._index.find(id_array_of(pa.chunked_array([as_ids(pa.array([name]))])))[0])

    def names(self, count: int) -> list[str]:
        """Return the smallest ids of prompts."""
        return hex_ids(self._ids[:count])


def end_tokens(tokenizer: Tokenizer, model: Model, completions: Sequence[np.ndarray]) -> tuple[int, ...]:
    """Return the tokens that end a completion.

    Those are the tokenizer's EOS and the model's own end tokens, because many chat models end a turn with another token
    than the EOS; and a special token that most completions of the data end with, because training teaches that one even
    to a base model, whose settings do not name it.

    Args:
        completions: token ids of some rows.
    """
    ends = {tokenizer.eos_token_id}
    for settings in (getattr(model, "generation_config", None), model.config):
        own = getattr(settings, "eos_token_id", None)
        ends |= set(own) if isinstance(own, list | tuple) else {own}
    special = set(tokenizer.all_special_ids)
    special |= {i for i, one in getattr(tokenizer, "added_tokens_decoder", {}).items() if one.special}
    last, times = Counter(int(ids[-1]) for ids in completions).most_common(1)[0]
    if last in special and 2 * times >= len(completions):
        ends.add(last)
    return tuple(sorted(int(one) for one in ends - {None}))
