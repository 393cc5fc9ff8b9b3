"""Names for the objects of libraries without types: whatever is done with them, a type checker sees `Any`.

A function that takes one says by the name what it is. `Any` itself is written in no other place for these.
"""

from collections.abc import Callable
from typing import Any, TypeAlias

Model: TypeAlias = Any
"""A `transformers.PreTrainedModel`, what PEFT, DDP, FSDP or DeepSpeed wrap around one, or a layer of it that a library made."""

ModelBody: TypeAlias = Callable[..., Any]
"""A model below its output layer, as it is called; it returns hidden states, keys and values."""

ModelConfig: TypeAlias = Any
"""A `transformers.PretrainedConfig`."""

Tokenizer: TypeAlias = Any
"""A `transformers.PreTrainedTokenizerBase`; `Any` for its class too."""

TokenizerBackend: TypeAlias = Any
"""A `tokenizers.Tokenizer`, or what stands for it in a slow tokenizer."""

Transformers: TypeAlias = Any
"""The module `transformers` or one of its classes; kto_core takes it as an argument."""

HubSession: TypeAlias = Any
"""The HTTP client of `huggingface_hub`, or one of its requests."""

AutogradContext: TypeAlias = Any
"""`ctx` of a `torch.autograd.Function`; attributes are set on it."""
