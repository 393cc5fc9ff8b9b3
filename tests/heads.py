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


def assert_naive_values_and_gradients(function, head, hidden, targets, *, tolerance):
    """Compare with products in float64."""
    ours, naive = (values_and_gradients(one, hidden, targets, head) for one in (function, naive_selected_logps))
    for mine, other in zip(ours, naive, strict=True):
        torch.testing.assert_close(mine, other, rtol=tolerance, atol=tolerance)


def assert_as_accurate_as_naive(function, head, hidden, targets, *, floor):
    """In float32, against float64: at most three times the error that a plain implementation makes."""
    exact = values_and_gradients(naive_selected_logps, hidden, targets, head)
    narrow, narrow_head = hidden.float(), as_dtype(head, torch.float32)
    ours, plain = (values_and_gradients(one, narrow, targets, narrow_head) for one in (function, naive_selected_logps))
    for mine, other, truth in zip(ours, plain, exact, strict=True):
        assert mine.dtype == torch.float32
        assert (mine.double() - truth).abs().max() <= 3 * (other.double() - truth).abs().max() + floor


def assert_logits_are_float32(function, head, hidden, targets, *, tolerance):
    """Check the logits of 16-bit operands, and that their gradients have the type of the operands."""
    ours = values_and_gradients(function, hidden, targets, head)
    exact = values_and_gradients(naive_selected_logps, hidden.double(), targets, as_dtype(head, torch.float64))
    assert [x.dtype for x in ours] == [torch.float32, *[hidden.dtype] * (len(ours) - 1)]
    torch.testing.assert_close(ours[0], exact[0].float(), rtol=0, atol=tolerance)
    for mine, truth in zip(ours[1:], exact[1:], strict=True):
        # A tile's gradient and the sum have 8 bits in bfloat16; Triton's interpreter cuts off instead of rounding.
        assert (mine.double() - truth).abs().max() <= 0.02 * truth.abs().max()


def assert_weight_gradient_is_added_in_float32(function, head, hidden, targets, *, times, in_place):
    """Many equal terms, of one token: a sum in bfloat16 stops at 256 of them."""
    gradient = torch.zeros_like(head.weight) if in_place else None
    many = Head(head.weight, None, 1.0, None, gradient)
    one = values_and_gradients(naive_selected_logps, hidden.double(), targets, as_dtype(head, torch.float64))[2]
    logps = function(hidden.expand(times, -1), targets.expand(times).contiguous(), many)
    logps.backward(torch.full_like(logps, -1.0))  # `one` is for a weight of -1
    found = (gradient if in_place else head.weight.grad).double()
    assert (found - times * one).abs().max() <= 0.02 * times * one.abs().max()


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
