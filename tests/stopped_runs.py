"""A run that stops in the middle, as if it had been killed, in the process of the test."""

from typing import Any

import pytest

from offline_kto.train.config import TrainConfig
from offline_kto.train.run.train_run import train
from offline_kto.train.trainer.kto_trainer import KTOTrainer


class StopError(Exception):
    """The kill."""


def train_until(config: TrainConfig, *, step: int, method: str = "training_step") -> None:
    """Train, until a method of the trainer is called after so many updates."""
    real = getattr(KTOTrainer, method)

    def stopping(self: Any, *arguments: Any, **options: Any) -> Any:
        if self.state.global_step == step:
            raise StopError
        return real(self, *arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(KTOTrainer, method, stopping)
        with pytest.raises(StopError):
            train(config)
