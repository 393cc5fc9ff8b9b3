"""Shard a model with FSDP2 so that its forward pass is that of one process under autocast.

matrices                      gathered in 16 bits, as autocast would cast them
norms, embeddings, the rest   gathered in float32

accelerate gives all groups of weights the same types. With 16 bits for all, the residual stream, norms and position
tables would be rounded too, and the policy would be another function than its reference.
"""

import contextlib
import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import accelerate
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import fsdp
from torch.distributed.fsdp import MixedPrecisionPolicy

from offline_kto.kto_core.errors import TrainingError
from offline_kto.kto_core.library_types import Model
from offline_kto.kto_core.models.precision import float32_modules
from offline_kto.train.trainer.gradient_sums import copy_tensors


class Types(NamedTuple):
    """The types of a sharded model.

    Attributes:
        compute: the type of matrix products.
        reduce: the type that gradients are summed in.
    """

    compute: torch.dtype
    reduce: torch.dtype

    @property
    def narrow(self) -> MixedPrecisionPolicy:
        """Return the types of matrices. Inputs are not cast: accelerate's own policy would also round the residual stream."""
        compute = None if self.compute == torch.float32 else self.compute
        return MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=self.reduce, cast_forward_inputs=False)

    @property
    def wide(self) -> MixedPrecisionPolicy:
        """Return the types of all other weights."""
        return MixedPrecisionPolicy(reduce_dtype=self.reduce)


def shard_in_types(accelerator: accelerate.Accelerator, types: Types) -> None:
    """Make accelerate shard the model in these types, and run it under autocast."""
    accelerator.state.fsdp_plugin.mixed_precision_policy = types.narrow
    prepare = accelerator.prepare

    @functools.wraps(prepare)
    def prepare_in_types(*args: Any, **kwargs: Any) -> Any:
        model = next((one for one in args if isinstance(one, nn.Module)), None)
        if model is None:
            return prepare(*args, **kwargs)
        with _whole_buffers(model), _sharding_first(model, types):
            prepared = prepare(*args, **kwargs)
        if types.compute != torch.float32:
            model.forward = torch.autocast(accelerator.device.type, dtype=types.compute)(model.forward)
        if dist.is_initialized():
            copy_tensors(model.buffers())  # a rank that did not read the model has none of its constants
        return prepared

    accelerator.prepare = prepare_in_types


@contextlib.contextmanager
def _whole_buffers(model: Model) -> Iterator[None]:
    """Keep a model's buffers out of its state for the block.

    Where one rank reads the weights for all, accelerate would look for the shards of those that are saved with the model.
    """
    saved = [
        (module, name)
        for module in model.modules()
        for name, _ in module.named_buffers(recurse=False)
        if name not in module._non_persistent_buffers_set
    ]
    for module, name in saved:
        module._non_persistent_buffers_set.add(name)
    try:
        yield
    finally:
        for module, name in saved:
            module._non_persistent_buffers_set.discard(name)


@contextlib.contextmanager
def _sharding_first(model: Model, types: Types) -> Iterator[None]:
    """Make the block's first call of `fully_shard` shard the float32 weights before its own.

    The calls that follow find these modules sharded. They cannot be sharded before: accelerate first moves the model
    to the meta device where one rank reads the weights for all.
    """
    fully_shard = fsdp.fully_shard
    wide = [] if types.compute == torch.float32 else float32_modules(model, types.compute)
    waiting = list(_groups(model, wide))

    @functools.wraps(fully_shard)
    def replacement(module: Any, **options: Any) -> Any:
        while waiting:
            group, stays = waiting.pop()
            kept = {"reshard_after_forward": False} if stays else {}
            fully_shard(group, **{**options, **kept, "mp_policy": types.wide})
        return fully_shard(module, **options)

    fsdp.fully_shard = replacement
    try:
        yield
    finally:
        fsdp.fully_shard = fully_shard
    if not all(isinstance(module, fsdp.FSDPModule) for module in wide):
        raise TrainingError(
            "Embeddings and norms would be rounded under FSDP2: this version of accelerate shards models differently. Please "
            "report it, with the versions of torch, transformers and accelerate; --dtype float32 may work."
        )


def _groups(model: Model, wide: Sequence[nn.Module]) -> Iterator[tuple[list[nn.Module], bool]]:
    """Yield the modules to gather together, and whether they stay gathered until the backward pass ends.

    All vectors are one group that stays: they are small, and a group in each layer would stand between the layers, each
    of which is gathered while the one before it computes.
    """
    tables = _embeddings(model)
    vectors = [one for one in wide if all(own.ndim < 2 for own in one.parameters(recurse=False))]
    if vectors:
        yield vectors, True
    if any(one in wide for one in tables):
        yield tables, len(tables) > 1
    for module in wide:
        if module not in vectors and module not in tables:
            yield [module], False


def _embeddings(model: Model) -> list[nn.Module]:
    """Return the embedding table, with the output layer if they share a weight: two groups cannot."""
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    return [table, head] if head is not None and head.weight is table.weight else [table]
