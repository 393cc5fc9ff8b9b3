"""Print what training a model takes, by recipe: `kto-train --plan-memory MODEL`."""

from collections.abc import Sequence
from pathlib import Path

import torch
import transformers

from offline_kto.kto_core.cache.manifest import MANIFEST, read_manifest
from offline_kto.kto_core.console import tell
from offline_kto.kto_core.errors import ModelError, said_by
from offline_kto.kto_core.models.folder_code import check_model_code
from offline_kto.kto_core.models.folders import find_folder
from offline_kto.kto_core.models.memory_check import gigabytes
from offline_kto.kto_core.models.outline import build_without_weights, classes_used
from offline_kto.train.model.memory_by_recipe import LORA_RANK, ModelSize, Need, needs_of, recommended, size_of
from offline_kto.train.model.token_budget import FEW_TOKENS, MOST_TOKENS

# GB of the cards that the table names.
CARDS = (24, 48, 80)

_OF_TOKENS = ("KiB a token", "checkpointed", *(f"tokens in {card} GB" for card in CARDS))

# Bytes below which a table is printed in MB.
_SMALL = 1e8


def print_memory(name: str, *, lora_rank: int = LORA_RANK, trust_remote_code: bool = False) -> None:
    """Print a model's table, and the recipe for the GPU at hand.

    Args:
        name: a folder with config.json, or a model of the hub; no weights are read.
        lora_rank: of the adapters.

    Raises:
        ModelError: not a causal language model.
    """
    size = _size(name, trust_remote_code=trust_remote_code)
    needs = needs_of(size, lora_rank=lora_rank)
    tell(f"model       {name}: {_in_words(size.weights)} weights, {size.layers} layers of {size.hidden:,}")
    tell("computed    from the model's shapes; nothing is loaded and nothing was measured")
    for line in table_lines(needs, weights=size.weights):
        tell(line)
    tell(
        f"            {_unit(needs)[0]}: weights, gradients and optimizer states on one GPU. Tokens: of one pass; * with gradient "
        "checkpointing; - does not fit"
    )
    for host in (need for need in needs if need.on_host):
        tell(f"            {host.recipe} takes {gigabytes(int(host.on_host))} of host memory")
    if torch.cuda.is_available():
        device = torch.cuda.get_device_properties(0)
        tell(f"{'fits':<12}{device.name} ({device.total_memory / 1e9:.0f} GB): {_advice(needs, device.total_memory)}")
    else:
        for card in CARDS:
            tell(f"{'fits':<12}{card} GB: {_advice(needs, card * 1e9)}")


def _in_words(count: int) -> str:
    return f"{count / 1e9:.3g} billion" if count >= 1e8 else f"{count:,}"


def _unit(needs: Sequence[Need]) -> tuple[str, float]:
    return ("MB", 1e6) if min(need.resident for need in needs) < _SMALL else ("GB", 1e9)


def _size(name: str, *, trust_remote_code: bool) -> ModelSize:
    try:
        folder, _ = find_folder(name, revision=None, weights=False)
        _check_describes_model(folder)
        return _checked_size(folder, trust_remote_code=trust_remote_code)
    except ModelError as error:
        raise ModelError(f"--plan-memory: {error}") from error


def _check_describes_model(folder: Path) -> None:
    if (folder / "config.json").exists():
        return
    if (folder / MANIFEST).exists():
        model = read_manifest(folder).reference.get("id")
        raise ModelError(f"{folder}: is a reference cache; its model is {model}. Pass that.")
    if (folder / "adapter_config.json").exists():
        raise ModelError(f"{folder}: an adapter, not a model. Pass its base model.")
    raise ModelError(f"{folder}: no config.json, so this is not a model folder.")


def _checked_size(folder: Path, *, trust_remote_code: bool) -> ModelSize:
    model = build_without_weights(transformers, folder, trust_remote_code=trust_remote_code)
    if not trust_remote_code:
        check_model_code(folder, *classes_used(model, folder))
    layers = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    if not isinstance(layers, int) or layers < 1:
        raise ModelError(f"{folder / 'config.json'}: num_hidden_layers is {layers}; a model has at least 1 layer.")
    try:
        return size_of(model)
    except (AttributeError, TypeError, ValueError, ArithmeticError) as error:
        raise ModelError(f"{folder}: the sizes in its config.json cannot be read: {said_by(error)}") from error


def table_lines(needs: Sequence[Need], *, weights: int) -> list[str]:
    """Return the table as text."""
    unit, scale = _unit(needs)
    header = ("recipe", unit, "bytes a weight", *_OF_TOKENS)
    rows = [header, *(_cells(need, weights, scale) for need in needs)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(header))]
    return ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip() for row in rows]


def _cells(need: Need, weights: int, scale: float) -> tuple[str, ...]:
    per_token = [f"{number / 1024:,.0f}" for number in (need.token, need.checkpointed)]
    resident = (f"{need.resident / scale:,.1f}", f"{need.resident / weights:.1f}")
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
