"""Compare each evaluation of held-out rows with the untrained policy, and with the evaluation of the lowest loss."""

import dataclasses
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from offline_kto.train.trainer.evaluation import Scores, changes_since
from offline_kto.train.trainer.objective import Objective

_LOWEST = "held_out_lowest.safetensors"

# Fewer than in the final evaluation: these intervals only serve the warnings during a run.
_RESAMPLES = 400


class HeldOutChanges:
    """The changes of held-out values in a run.

    Attributes:
        untrained: scores before training; None if they are not known.
    """

    def __init__(self, objective: Objective) -> None:
        self.objective = objective
        self.untrained: Scores | None = None
        self._lowest: Scores | None = None
        self._loss = float("inf")

    def add(self, scores: Scores, loss: float) -> dict[str, float]:
        """Add an evaluation, and return what has changed; see `MetricsRecord`."""
        found: dict[str, float] = {}
        if self.untrained is not None:
            changes = changes_since(self.untrained, scores, self.objective, resamples=_RESAMPLES)
            for name, metric in (("loss", "loss"), ("margin", "rewards/margins")):
                change = changes.get(metric)
                if change is not None and change.low is not None and change.high is not None:
                    found |= {
                        f"change/{name}": change.value,
                        f"change/{name}_low": change.low,
                        f"change/{name}_high": change.high,
                    }
        if loss < self._loss:
            self._lowest, self._loss = scores, loss
        elif self._lowest is not None:
            low = changes_since(self._lowest, scores, self.objective, resamples=_RESAMPLES)["loss"].low
            found |= {} if low is None else {"since_lowest/loss_low": low}
        return found

    def save(self, checkpoint: Path) -> None:
        """Write the evaluation of the lowest loss into a checkpoint."""
        if self._lowest is not None:
            save_file(
                {**to_tensors(self._lowest), "loss": torch.tensor(self._loss, dtype=torch.float64)},
                checkpoint / _LOWEST,
            )

    def load(self, checkpoint: Path, like: Scores) -> None:
        """Load the evaluation of the lowest loss from a checkpoint; one of an older version has none.

        Args:
            like: scores of the same rows.
        """
        found = load_file(checkpoint / _LOWEST) if (checkpoint / _LOWEST).exists() else {}
        self._lowest = from_tensors(found, like)
        if self._lowest is not None:
            self._loss = float(found["loss"])


def to_tensors(scores: Scores) -> dict[str, torch.Tensor]:
    """Return what a policy's scores have beyond the rows."""
    shift = {} if scores.shift is None else {"shift": torch.tensor(scores.shift, dtype=torch.float64)}
    kl = {} if scores.kl_logratios is None else {"kl_logratios": scores.kl_logratios.contiguous()}
    clipped = {} if scores.clipped is None else {"clipped": scores.clipped.contiguous()}
    return {"logps": scores.logps.contiguous(), "logratios": scores.logratios.contiguous(), **kl, **shift, **clipped}


def from_tensors(tensors: dict[str, torch.Tensor], like: Scores) -> Scores | None:
    """Return scores of the same rows from `to_tensors`; None if they are of other rows, or for another loss."""
    expected = to_tensors(like)
    if any(name not in tensors or tensors[name].shape != one.shape for name, one in expected.items()):
        return None
    kl, shift = tensors.get("kl_logratios"), tensors.get("shift")
    return dataclasses.replace(
        like,
        logps=tensors["logps"],
        logratios=tensors["logratios"],
        kl_logratios=None if like.kl_logratios is None else kl,
        shift=None if shift is None or like.shift is None else float(shift),
        clipped=None if like.clipped is None else tensors.get("clipped"),
    )


def save_untrained(path: Path, scores: Scores) -> None:
    """Write the scores of the untrained policy, where they cannot be computed from the cache."""
    save_file(to_tensors(scores), path)


def load_untrained(path: Path, like: Scores) -> Scores | None:
    """Read the scores of the untrained policy; None if there are none of these rows."""
    try:
        return from_tensors(load_file(path), like)
    except (OSError, SafetensorError):
        return None
