"""Describe a model's output layer, the map from hidden states to logits, and where its gradient goes."""

from dataclasses import dataclass

from torch import Tensor, nn

from offline_kto.kto_core.errors import ModelError
from offline_kto.kto_core.library_types import Model, ModelConfig

# Attribute of an output layer whose gradient exists before the forward pass; the backward pass adds to it in place.
_IN_PLACE = "gradient_in_place"


@dataclass(frozen=True)
class Head:
    """The map from hidden states to logits: `softcap * tanh((h W^T + b) * scale / softcap)`."""

    weight: Tensor  # (vocabulary, hidden)
    bias: Tensor | None
    scale: float
    softcap: float | None
    # The tensor to which the weight's gradient is added, instead of being returned: see `add_gradients_in_place`.
    gradient: Tensor | None = None

    @classmethod
    def of(cls, model: Model) -> "Head":
        """Read the head of a causal language model and its family's scaling.

        Raises:
            ModelError: the output embedding is not a linear layer.
        """
        layer = model.get_output_embeddings()
        weight = getattr(layer, "weight", None)
        if weight is None or len(whole_shape(weight)) != 2:
            raise ModelError(
                f"{type(model).__name__} has no linear output layer; only causal language models can be scored."
            )
        config = model.config.get_text_config()
        softcap = getattr(config, "final_logit_softcapping", None)
        gradient = weight.grad if getattr(layer, _IN_PLACE, False) else None
        return cls(weight, getattr(layer, "bias", None), _logit_scale(config), softcap or None, gradient)


def to_logits_(products: Tensor, bias: Tensor | None, scale: float, softcap: float | None) -> Tensor:
    """Turn products of hidden states and weights into logits, in place: the rest of the map of `Head`."""
    if bias is not None:
        products += bias
    if scale != 1.0:
        products *= scale
    if softcap is not None:
        products.div_(softcap).tanh_().mul_(softcap)
    return products


def add_gradients_in_place(model: Model) -> list[Tensor]:
    """Let backward passes add to the gradients of a model's largest matrices in place.

    By default, autograd allocates in every pass a tensor as large as the vocabulary's matrix for the output layer,
    another for the embeddings, and a third for their sum. This is only for unsharded weights, in one process or under
    DDP without its reducer: hooks on gradients do not see them.

    Returns:
        The weights; their `grad` must be a tensor (zeros at first) when a forward pass begins.
    """
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    weights = []
    if head.weight.requires_grad:
        setattr(head, _IN_PLACE, True)
        weights.append(head.weight)
    if isinstance(embeddings, nn.Embedding) and embeddings.weight.requires_grad:
        embeddings.sparse = True  # the gradient then has only the rows that were read
        weights += [] if embeddings.weight is head.weight else [embeddings.weight]
    return weights


def whole_shape(parameter: Tensor) -> tuple[int, ...]:
    """Return a parameter's unsharded shape, which DeepSpeed ZeRO-3 notes when it empties the tensor."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def _logit_scale(config: ModelConfig) -> float:
    """Return the factor on the logits. Cohere and Falcon-H1 multiply, Granite divides."""
    for name in ("logit_scale", "lm_head_multiplier"):
        scale = getattr(config, name, None)
        if isinstance(scale, str):
            raise ModelError(f"{config.model_type} models with {name} {scale!r} are not supported.")
        if scale is not None:
            return float(scale)
    if getattr(config, "logits_scaling", None) is not None:
        return 1.0 / float(config.logits_scaling)
    return 1.0
