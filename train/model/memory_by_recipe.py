"""Estimate the memory that training a model takes by every recipe, activations included, from its shapes alone.

This is for choosing a recipe (`kto-train --plan-memory`); `training_memory.py` counts what a given run takes at least.

resident   weights, gradients and optimizer states
a token    what the layers keep for the backward pass: sums over h, q, k and f, the widths of hidden states, queries, keys and
           intermediate states (tests/test_memory_by_recipe.py compares them with real allocations)
"""

from dataclasses import dataclass

from torch import nn

from offline_kto.kto_core.library_types import Model
from offline_kto.kto_core.models.narrow_embedding import can_be_narrow
from offline_kto.kto_core.models.quantization import fits_four_bits
from offline_kto.train.model.token_budget import FEW_TOKENS, USED

# The output layer's logits, library workspaces and the CUDA context.
_OVERHEAD = 2e9

# Bytes that 8-bit moments and their scales take for a weight.
_NARROW_MOMENTS = 2 + 8 / 256

# bitsandbytes' NF4 with double quantisation: 4.127 bits.
_FOUR_BITS = 4.127 / 8

LORA_RANK = 16


@dataclass(frozen=True)
class ModelSize:
    """What memory depends on.

    Attributes:
        weights: all of them; tied ones count once.
        matrices: those of linear layers and stacked experts inside of the decoder layers.
        packed: those of `matrices` that a quantised base has in 4 bits; stacked experts stay in 16.
        head: those of the output layer, if it is not also the embedding table.
        tables: those of plain embedding tables.
        adapters: those of LoRA adapters of rank 1 on all linear layers of the decoder.
        layers: number of decoder layers.
        hidden, queries, keys, intermediate: widths.
    """

    weights: int
    matrices: int
    packed: int
    head: int
    tables: int
    adapters: int
    layers: int
    hidden: int
    queries: int
    keys: int
    intermediate: int

    @property
    def narrow(self) -> int:
        """Weights that may be stored in 16 bits."""
        return self.matrices + self.head + self.tables


@dataclass(frozen=True)
class Need:
    """Bytes on one device.

    Attributes:
        recipe: its name, with the options that choose it.
        resident: weights, gradients and optimizer states.
        token: kept for each token of a pass; with gradient checkpointing `checkpointed`.
        layer: kept while one checkpointed layer is computed again, for each token.
        on_host: bytes of host memory.
    """

    recipe: str
    resident: float
    token: float
    checkpointed: float
    layer: float
    on_host: float = 0.0

    def tokens_in(self, device: float, *, checkpointing: bool) -> int:
        """Return the tokens of one pass that fit into a device of some bytes; 0 if the weights do not."""
        room = USED * device - self.resident - _OVERHEAD
        return max(0, int(room / (self.checkpointed + self.layer if checkpointing else self.token)))


def size_of(model: Model) -> ModelSize:
    """Return a model's size; it may be on the meta device."""
    config = model.config.get_text_config()
    heads = int(getattr(config, "num_attention_heads", 1) or 1)
    hidden = int(config.hidden_size)
    width = int(getattr(config, "head_dim", None) or hidden // heads)
    keys = int(getattr(config, "num_key_value_heads", None) or heads)
    head = model.get_output_embeddings()
    tied = head is not None and head.weight is model.get_input_embeddings().weight
    linear = [module for module in model.modules() if isinstance(module, nn.Linear) and module is not head]
    stacks = [
        weight
        for module in model.modules()
        if not isinstance(module, nn.Linear | nn.Embedding)
        for weight in module.parameters(recurse=False)
        if weight.ndim >= 3 or (weight.ndim == 2 and not isinstance(module, nn.Linear))
    ]
    widths = (getattr(config, name, None) for name in ("moe_intermediate_size", "intermediate_size", "n_inner"))
    intermediate = int(next((width for width in widths if width), 4 * hidden))
    experts = int(getattr(config, "num_experts_per_tok", None) or 1)
    return ModelSize(
        weights=sum(weight.numel() for weight in model.parameters()),
        matrices=sum(module.weight.numel() for module in linear) + sum(weight.numel() for weight in stacks),
        packed=sum(
            module.weight.numel() for module in model.modules() if fits_four_bits(module) and module is not head
        ),
        head=0 if tied or head is None else head.weight.numel(),
        tables=sum(module.weight.numel() for module in model.modules() if can_be_narrow(module)),
        adapters=sum(module.in_features + module.out_features for module in linear),
        layers=int(config.num_hidden_layers),
        hidden=hidden,
        queries=heads * width,
        keys=keys * width,
        intermediate=intermediate * experts,
    )


def needs_of(size: ModelSize, *, ranks: int = 8, lora_rank: int = LORA_RANK) -> list[Need]:
    """Return what every recipe takes, from the most exact to the smallest.

    Args:
        ranks: number of GPUs of the sharded ones.
        lora_rank: rank of the adapters.
    """
    wide = size.weights - size.narrow
    adapters = lora_rank * size.adapters
    # Autocast keeps a 16-bit copy of the matrices of the layers until the end of the backward pass.
    full = 16.0 * size.weights + 2 * size.matrices
    lean = (4 + _NARROW_MOMENTS) * size.narrow + 16 * wide
    trained = {
        "token": _layers(size, 12, 4, 4, 4),
        "checkpointed": _layers(size, 4),
        "layer": _layer(size, 26, 4, 4, 8),
    }
    lora = {"token": _layers(size, 18, 6, 4, 4), "checkpointed": _layers(size, 4), "layer": _layer(size, 18, 6, 4, 8)}
    on_base = 18.0 * adapters
    return [
        Need("full", full, **trained),
        Need("lean (--memory lean)", lean, **trained),
        Need("host (--memory host)", 4.0 * size.narrow + 8 * wide, **trained, on_host=12.0 * size.weights),
        Need(
            f"LoRA (--lora-rank {lora_rank})",
            2.0 * (size.matrices + size.head) + 4 * (wide + size.tables) + on_base,
            **lora,
        ),
        Need(
            f"QLoRA (a 4-bit base, --lora-rank {lora_rank})",
            _FOUR_BITS * size.packed + 2.0 * (size.weights - size.packed) + on_base,
            **lora,
        ),
        Need(f"full, FSDP2 on {ranks} GPUs", 16.0 * size.weights / ranks + _gathered(size, of_table=4), **trained),
        Need(f"lean, FSDP2 on {ranks} GPUs", lean / ranks + _gathered(size, of_table=2), **trained),
    ]


def _gathered(size: ModelSize, *, of_table: int) -> float:
    """Return the bytes of whole weights and gradients that a rank holds for a moment under FSDP2.

    That is embedding table, output layer and two layers, of which one has a gradient that is summed in float32.

    Args:
        of_table: bytes of a weight of the embedding table.
    """
    layer = size.matrices / size.layers
    return float(of_table * size.tables + 2 * size.head + 2 * 2 * layer + (2 + 4) * layer)


def _layer(size: ModelSize, hidden: int, queries: int = 0, keys: int = 0, intermediate: int = 0) -> float:
    parts = (hidden * size.hidden, queries * size.queries, keys * size.keys, intermediate * size.intermediate)
    return float(sum(parts))


def _layers(size: ModelSize, *factors: int) -> float:
    return size.layers * _layer(size, *factors)


def recommended(needs: list[Need], device: float) -> tuple[Need, bool] | None:
    """Return the first recipe for one device that leaves room for a pass, and whether it needs gradient checkpointing."""
    for need in needs:
        if "FSDP2" in need.recipe:
            continue
        for checkpointing in (False, True):
            if need.tokens_in(device, checkpointing=checkpointing) >= FEW_TOKENS:
                return need, checkpointing
    return None
