"""Use Liger's kernels inside of a model's layers (`training: use_liger_kernel`), and never in place of the scoring forward.

transformers applies them when training begins. By default they also replace the model's forward by one that computes
their own loss, in which no scores exist.
"""

import torch
from transformers.utils import is_liger_kernel_available

from offline_kto.kto_core.errors import ConfigError, TrainingError
from offline_kto.kto_core.library_types import Model
from offline_kto.kto_core.scoring.model_code import family_of

# Parts of Liger that compute a loss over the vocabulary.
_LOSSES = ("fused_linear_cross_entropy", "cross_entropy")


def liger_settings(given: dict[str, bool] | None, device: torch.device) -> dict[str, bool]:
    """Return Liger's settings without the parts that compute a loss.

    Args:
        given: `training: liger_kernel_config`; its choice of layer kernels is kept.
        device: the device that will train.

    Raises:
        ConfigError: the kernels cannot run, or a setting asks for another loss.
    """
    if not is_liger_kernel_available():
        raise ConfigError(
            "training: use_liger_kernel: the package liger-kernel is not installed: pip install liger-kernel"
        )
    if device.type == "cpu":
        raise ConfigError("training: use_liger_kernel: its kernels run on GPUs only. Remove it from the table.")
    given = given or {}
    for name in _LOSSES:
        if given.get(name):
            raise ConfigError(
                f"training: liger_kernel_config: {name} would replace the losses of kto-train by cross-entropy. Remove it "
                "from the table; the kernels of the layers (rope, rms_norm, swiglu ...) can be chosen there."
            )
    return {**given, **dict.fromkeys(_LOSSES, False)}


def check_liger_supports(model: Model) -> None:
    """Refuse a family without Liger kernels: transformers would train it as if the setting were not there.

    Raises:
        TrainingError: Liger has no kernels for it.
    """
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

    if getattr(model.config, "model_type", None) not in MODEL_TYPE_TO_APPLY_LIGER_FN:
        raise TrainingError(
            f"training: use_liger_kernel: liger-kernel has no kernels for this model family ({family_of(model)}). Remove it from "
            "the table, or install a newer version."
        )
