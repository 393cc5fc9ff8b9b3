"""Switch gradient checkpointing of a model: activations of a layer are computed again in the backward pass."""

from offline_kto.kto_core.library_types import Model

# Renamed in transformers 5.24.
_ENABLE = ("activation_checkpointing_enable", "gradient_checkpointing_enable")
_DISABLE = ("activation_checkpointing_disable", "gradient_checkpointing_disable")
_IS_ON = ("is_activation_checkpointing", "is_gradient_checkpointing")


def can_checkpoint(model: Model) -> bool:
    """Return whether a model's family supports it."""
    return bool(getattr(model, "supports_gradient_checkpointing", False))


def enable_checkpointing(model: Model) -> None:
    """Keep the input of each layer only."""
    _method(model, _ENABLE)({"use_reentrant": False})


def disable_checkpointing(model: Model) -> None:
    """Keep all activations."""
    _method(model, _DISABLE)()


def is_checkpointing(model: Model) -> bool:
    """Return whether activations are computed again."""
    return bool(_method(model, _IS_ON))


def _method(model: Model, names: tuple[str, ...]) -> Model:
    return next(getattr(model, name) for name in names if hasattr(type(model), name) or hasattr(model, name))
