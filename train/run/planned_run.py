"""Check the options of a run and where its policy comes from, and print the plan, before the policy is loaded."""

import platform
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers

from offline_kto.kto_core.console import tell
from offline_kto.kto_core.launch import sharding_asked_for
from offline_kto.kto_core.models.precision import Precision, resolve_device
from offline_kto.train.config import TrainConfig
from offline_kto.train.data.training_data import TrainingData
from offline_kto.train.diagnostics.settings import class_weight_values, warnings_for
from offline_kto.train.model.policy import PolicyFiles
from offline_kto.train.model.recipe import run_precision
from offline_kto.train.run.arguments import Arguments, training_arguments
from offline_kto.train.run.folder import last_checkpoint
from offline_kto.train.run.inputs import Materials
from offline_kto.train.run.optimizer import check_sharding
from offline_kto.train.run.plan import print_plan
from offline_kto.train.run.plan_warnings import idle_gpu_warnings, rank_warnings, saving_warnings
from offline_kto.train.run_records import ComputedWith
from offline_kto.train.trainer.objective import Objective


@dataclass(frozen=True)
class Plan:
    """A run whose policy is not loaded yet.

    Attributes:
        checkpoint: the checkpoint to resume from, or None.
        warnings: the warnings of the plan, on the process that prints.
    """

    config: TrainConfig
    device: torch.device
    precision: Precision
    objective: Objective
    args: Arguments
    files: PolicyFiles
    checkpoint: str | None
    warnings: list[str]

    @classmethod
    def make(
        cls, config: TrainConfig, out: Path, data: TrainingData, materials: Materials, name: str | None = None
    ) -> "Plan":
        """Check options, policy and checkpoint, and print the plan. Write nothing.

        Args, Raises: as `offline_kto.train.run.training_run.TrainingRun.set_up`.
        """
        device = resolve_device(config.device)
        precision = run_precision(config, device)
        objective = Objective.of(config, class_weight_values(config, *data.class_masses))
        warnings: list[str] = []
        args = training_arguments(config, out, precision, held_out=data.held_out is not None, name=name)
        check_sharding(config, args)
        files = materials.files(config, data.rows.manifest)
        now: ComputedWith = {
            "precision": precision.name,
            "versions": versions(),
            "held_out_cache": data.held_out_cache,
        }
        main = args.process_index == 0
        updates = config.updates(data.units.size)
        checkpoint = last_checkpoint(config, out, data.rows.manifest, now, updates=updates, main=main)
        if main:
            warnings += data.warnings(config, precision)
            warnings += rank_warnings(config, data, ranks=args.world_size, device=device)
            merges = bool(config.lora_rank and files.adapter)
            warnings += saving_warnings(config, merges=merges, held_out=data.held_out is not None)
            warnings += idle_gpu_warnings(args)
            warnings += warnings_for(
                config, *data.class_masses, objective.weights, by_mass=data.rows.masses is not None
            )
            estimates = name is None  # only trials of a sweep have names
            print_plan(config, data, files, precision, objective, out, device, warnings, estimates=estimates)
            if config.resume:
                tell(f"resume      {checkpoint or 'no checkpoint yet: starting from the beginning'}")
        return cls(config, device, precision, objective, args, files, checkpoint, warnings)

    @property
    def is_main(self) -> bool:
        """Return whether this is the process that prints and writes."""
        return bool(self.args.process_index == 0)

    def check(self) -> None:
        """Check what loading the policy would, as far as that takes no weights.

        Raises:
            ModelError, TrainingError: see `PolicyFiles.check_trainable`.
        """
        whole_fits = self.device.type == "cuda" and not sharding_asked_for()
        self.files.check_trainable(self.config, self.precision, self.args.device if whole_fits else torch.device("cpu"))


def versions() -> dict[str, str]:
    """Return the versions of Python, torch and transformers."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
