"""Define type aliases for objects of untyped libraries; a type checker treats each as `Any`.

A parameter's alias documents which object it takes. `Any` is not written elsewhere for these objects.
"""

from collections.abc import Callable
from typing import Any, TypeAlias

Model: TypeAlias = Any
"""A `transformers.PreTrainedModel`, a wrapper of it by PEFT, DDP, FSDP or DeepSpeed, or one of its layers."""

ModelBody: TypeAlias = Callable[..., Any]
"""A callable model without its output layer; it returns hidden states, keys and values."""

ModelConfig: TypeAlias = Any
"""A `transformers.PretrainedConfig`."""

Tokenizer: TypeAlias = Any
"""A `transformers.PreTrainedTokenizerBase`; `Any` for its class too."""

TokenizerBackend: TypeAlias = Any
"""A `tokenizers.Tokenizer`, or its equivalent in a slow tokenizer."""

CompiledTemplate: TypeAlias = Any
"""A `jinja2.Template`, compiled in the sandbox of `transformers`."""

Transformers: TypeAlias = Any
"""The module `transformers` or one of its classes; kto_core takes it as an argument."""

HubSession: TypeAlias = Any
"""The HTTP client of `huggingface_hub`, or one of its requests."""

AutogradContext: TypeAlias = Any
"""`ctx` of a `torch.autograd.Function`; attributes are set on it."""
