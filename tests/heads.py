"""Output layers of all kinds, small, with a naive implementation to compare with."""

import torch
import torch.nn.functional as F
from models import VOCABULARY
from torch.utils._python_dispatch import TorchDispatchMode

from offline_kto.kto_core.scoring.output_layer import Head


def naive_selected_logps(hidden, targets, head):
    logits = F.linear(hidden, head.weight, head.bias) * head.scale
    if head.softcap is not None:
        logits = head.softcap * torch.tanh(logits / head.softcap)
    return logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]


HEADS = {
    "plain": {"bias": False, "scale": 1.0, "softcap": None},
    "bias": {"bias": True, "scale": 1.0, "softcap": None},
    "scale": {"bias": False, "scale": 0.3, "softcap": None},
    "softcap": {"bias": False, "scale": 1.0, "softcap": 2.0},
    "all": {"bias": True, "scale": 1.7, "softcap": 2.0},
}


def make_head(kind, *, vocabulary=VOCABULARY, hidden_size=8, dtype=torch.float64, seed=0):
    torch.manual_seed(seed)
    options = HEADS[kind]
    weight = torch.randn(vocabulary, hidden_size, dtype=dtype).requires_grad_()
    bias = torch.randn(vocabulary, dtype=dtype).requires_grad_() if options["bias"] else None
    return Head(weight, bias, options["scale"], options["softcap"])


def make_inputs(tokens, *, vocabulary=VOCABULARY, hidden_size=8, dtype=torch.float64):
    torch.manual_seed(1)
    hidden = torch.randn(tokens, hidden_size, dtype=dtype).requires_grad_()
    return hidden, torch.randint(vocabulary, (tokens,))


def as_dtype(head, dtype, device=None):
    weight = head.weight.detach().to(device, dtype).requires_grad_()
    bias = None if head.bias is None else head.bias.detach().to(device, dtype).requires_grad_()
    return Head(weight, bias, head.scale, head.softcap)


def values_and_gradients(function, hidden, targets, head):
    """Values, then gradients by hidden states, weight and bias, of a sum in which each token has its own weight."""
    hidden = hidden.detach().requires_grad_()
    values = function(hidden, targets, head)
    inputs = [x for x in (hidden, head.weight, head.bias) if x is not None]
    weights = torch.linspace(-1, 2, len(values), dtype=values.dtype, device=values.device)
    return [values.detach(), *torch.autograd.grad((values * weights).sum(), inputs)]


class LargestTensor(TorchDispatchMode):
    """Records the size of the largest dense tensor that any operation returns, in the backward pass as well.

    Args:
        besides: tensors whose memory, and views of it, do not count.
    """

    def __init__(self, besides=()):
        super().__init__()
        self.elements, self.known = 0, {tensor.untyped_storage().data_ptr() for tensor in besides}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, torch.Tensor) and not tensor.is_sparse and self._is_new(tensor):
                self.elements = max(self.elements, tensor.numel())
        return out

    def _is_new(self, tensor):
        return not self.known or tensor.untyped_storage().data_ptr() not in self.known
