"""Print what training a model takes, by recipe: `kto-train --plan-memory MODEL`."""

from collections.abc import Sequence

import torch
import transformers

from offline_kto.kto_core.console import tell
from offline_kto.kto_core.errors import ModelError, said_by
from offline_kto.train.model.memory_by_recipe import ModelSize, Need, needs_of, recommended, size_of
from offline_kto.train.model.token_budget import FEW_TOKENS, MOST_TOKENS

# GB of the cards that the table names.
CARDS = (24, 48, 80)

_COLUMNS = (
    "recipe",
    "GB",
    "bytes a weight",
    "KiB a token",
    "checkpointed",
    *(f"tokens in {card} GB" for card in CARDS),
)


def print_memory(name: str, *, trust_remote_code: bool) -> None:
    """Print a model's table, and the recipe for the GPU at hand.

    Args:
        name: a folder with config.json, or a model of the hub; no weights are read.

    Raises:
        ModelError: not a causal language model.
    """
    size = _size(name, trust_remote_code=trust_remote_code)
    needs = needs_of(size)
    tell(f"model       {name}: {size.weights / 1e9:.3g} billion weights, {size.layers} layers of {size.hidden:,}")
    tell("computed    from the model's shapes; nothing is loaded and nothing was measured")
    for line in table_lines(needs, weights=size.weights):
        tell(line)
    tell(
        "            GB: weights, gradients and optimizer states on one GPU. Tokens: of one pass; * with gradient checkpointing; "
        "- does not fit"
    )
    for host in (need for need in needs if need.on_host):
        tell(f"            {host.recipe} takes {host.on_host / 1e9:,.0f} GB of host memory")
    if torch.cuda.is_available():
        device = torch.cuda.get_device_properties(0)
        tell(f"{'fits':<12}{device.name} ({device.total_memory / 1e9:.0f} GB): {_advice(needs, device.total_memory)}")
    else:
        for card in CARDS:
            tell(f"{'fits':<12}{card} GB: {_advice(needs, card * 1e9)}")


def _size(name: str, *, trust_remote_code: bool) -> ModelSize:
    try:
        config = transformers.AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
        return size_of(model)
    except Exception as error:  # a model's own code may raise anything
        raise ModelError(
            f"--plan-memory {name}: not the configuration of a causal language model: {said_by(error)}"
        ) from error


def table_lines(needs: Sequence[Need], *, weights: int) -> list[str]:
    """Return the table as text."""
    rows = [_COLUMNS, *(_cells(need, weights) for need in needs)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(_COLUMNS))]
    return ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip() for row in rows]


def _cells(need: Need, weights: int) -> tuple[str, ...]:
    per_token = [f"{number / 1024:,.0f}" for number in (need.token, need.checkpointed)]
    resident = (f"{need.resident / 1e9:,.1f}", f"{need.resident / weights:.1f}")
    return (need.recipe, *resident, *per_token, *(tokens_cell(need, card * 1e9) for card in CARDS))


def tokens_cell(need: Need, device: float) -> str:
    """Return the tokens of one pass; with gradient checkpointing (`*`) if few would fit without."""
    for checkpointing, mark in ((False, ""), (True, "*")):
        tokens = need.tokens_in(device, checkpointing=checkpointing)
        if tokens >= FEW_TOKENS:
            return f"{min(tokens, MOST_TOKENS):,}{mark}"
    return f"{tokens:,}*" if tokens >= 512 else "-"


def _advice(needs: list[Need], device: float) -> str:
    found = recommended(needs, device)
    if found is None:
        return f"no recipe leaves room for {FEW_TOKENS:,} tokens; use a larger GPU, or several with FSDP2"
    need, checkpointing = found
    return need.recipe + (", with gradient checkpointing" if checkpointing else "")
