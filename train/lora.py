"""LoRA: the only file that knows peft."""

from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from kto_core.errors import ConfigError, ModelError, in_one_line
from train.config import TrainConfig


def check_installed() -> None:
    """Raises: ModelError: peft is missing."""
    try:
        import peft  # noqa: F401
    except ImportError as error:
        raise ModelError("--lora-rank needs peft. Install it with: pip install 'offline-kto[lora]'") from error


def add_adapters(model: Any, config: TrainConfig, *, base: str) -> Any:
    """Freeze a model and put trainable float32 adapters on it; at the start they change nothing (B = 0).

    Args:
        model: from `load_causal_lm`, frozen.
        config: `lora_rank`, `lora_alpha`, `lora_targets`.
        base: the name under which the saved adapters will look for their base model.

    Raises:
        ConfigError: targets that this model does not have.
    """
    import peft

    targets: Any = config.lora_targets
    if targets != "all-linear":
        targets = [name.strip() for name in targets.split(",") if name.strip()]
        if any(name.split(".")[-1] in ("lm_head", "embed_out", "output") for name in targets):
            raise ConfigError("--lora-targets: the output layer cannot carry an adapter; its rows are read one by one.")
    settings = peft.LoraConfig(
        r=config.lora_rank,
        lora_alpha=config.lora_alpha or 2 * config.lora_rank,
        target_modules=targets,
        lora_dropout=0.0,
        bias="none",
        task_type="CAUSAL_LM",
    )
    try:
        adapted = peft.get_peft_model(model, settings)
    except ValueError as error:
        raise ConfigError(f"--lora-targets {config.lora_targets}: {str(error).splitlines()[0]}") from error
    adapted.peft_config["default"].base_model_name_or_path = base
    return adapted


def load_adapters(model: Any, folder: Path) -> Any:
    """Put trained adapters on the model below them, unmerged as they were trained.

    Raises:
        ModelError: they cannot be read, or do not fit.
    """
    check_installed()
    import peft

    try:
        return peft.PeftModel.from_pretrained(model, str(folder))
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise ModelError(f"{folder}: its adapters cannot be put on the model: {in_one_line(error)}") from error


def without_adapters(adapted: Any) -> AbstractContextManager[None]:
    """Return a block in which the model below computes as if it had no adapters."""
    off: AbstractContextManager[None] = adapted.disable_adapter()
    return off


def remove_adapters(adapted: Any) -> None:
    """Leave the model below as it was before `add_adapters`."""
    model = adapted.unload()
    if hasattr(model, "peft_config"):
        del model.peft_config


def merged(adapted: Any) -> Any:
    """Return the model below with its adapters merged into its weights."""
    return adapted.merge_and_unload()
