"""Compare implementations of the output layer: time, peak memory, and the error against float64.

    python benchmarks/head_bench.py                                                    # sizes of real models, on CUDA
    python benchmarks/head_bench.py --tiles 4096x16384,2048x8192 --sizes 896x151936    # other tiles
    python benchmarks/head_bench.py --device cpu --tokens 64 --sizes 64x512            # a quick test

chunks    `head.py`: chunks of whole rows of logits, a fused softmax
triton    `cuda_head.py`: tiles, with Triton's operations on them
plain     `cuda_head.py`: tiles, with the operations in plain torch
whole     all logits at once, and `F.cross_entropy`

Passes: `scores` without gradient, `frozen` with the gradient of the hidden states, as in LoRA training, and `trained` with
that of the weight as well, added in place. Weights are float32 under autocast, with values that bfloat16 holds: errors
are those of the output layer, not of its inputs. Times are medians; memory is what a pass allocates at its peak. Errors of
scores are mean nats a token, over the first tokens; those of the gradients of these tokens' hidden states and of some rows
of the weight are relative (root mean square). `TFLOP/s` counts the products that a pass needs: one to score, three with
both gradients.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from unittest import mock

import torch
import torch.nn.functional as F
from text_table import text_table
from torch import Tensor

from offline_kto.kto_core.errors import ModelError
from offline_kto.kto_core.models.precision import resolve_device, use_device
from offline_kto.kto_core.scoring import cuda_head
from offline_kto.kto_core.scoring.cuda_head import tiled_logps
from offline_kto.kto_core.scoring.head import selected_logps
from offline_kto.kto_core.scoring.head_tiles import PLAIN, TileOperations
from offline_kto.kto_core.scoring.output_layer import Head

# Qwen2.5-0.5B and 1.5B, Llama-3-8B, Llama-2-7B: hidden size and vocabulary.
SIZES = "896x151936,1536x151936,4096x128256,4096x32000"
PRODUCTS = {"scores": 1, "frozen": 2, "trained": 3}
COMPARED = 256  # tokens, and rows of the weight

Logps = Callable[[Tensor, Tensor, Head], Tensor]


@dataclass(frozen=True)
class Measured:
    """One line of the table; None where it ran out of memory."""

    size: str
    variant: str
    step: str
    milliseconds: float | None = None
    teraflops: float | None = None
    peak_mib: float | None = None
    score_error: float | None = None
    hidden_error: float | None = None
    weight_error: float | None = None

    def cells(self) -> list[str]:
        """Return the line as text."""
        errors = (self.score_error, self.hidden_error, self.weight_error)
        if self.milliseconds is None:
            return [self.size, self.variant, self.step, "out of memory", *[""] * 5]
        numbers = [f"{self.milliseconds:.2f}", f"{self.teraflops:.3g}", _text(self.peak_mib, ".0f")]
        return [self.size, self.variant, self.step, *numbers, *(_text(error, ".1e") for error in errors)]


def _text(number: float | None, form: str) -> str:
    return "" if number is None else format(number, form)


class Case:
    """Inputs of one size, and parts of their exact scores and gradients in float64."""

    def __init__(self, hidden_size: int, vocabulary: int, tokens: int, device: torch.device) -> None:
        torch.manual_seed(0)
        hidden, weight = (torch.randn(rows, hidden_size, device=device) for rows in (tokens, vocabulary))
        self.hidden = hidden.bfloat16().float().requires_grad_()
        self.weight = (weight * (3 * hidden_size**-0.5)).bfloat16().float().requires_grad_()
        self.targets = torch.randint(vocabulary, (tokens,), device=device)
        self.grad = torch.randn(tokens, device=device)
        self.columns = self.targets[:COMPARED].unique()
        with torch.no_grad():
            self.exact = self._exact()

    def _exact(self) -> tuple[Tensor, Tensor, Tensor]:
        weight, grad = self.weight.double(), self.grad.double()
        grad_rows = torch.zeros(len(self.columns), weight.shape[1], dtype=torch.float64, device=weight.device)
        for number, part in enumerate(torch.arange(len(grad), device=grad.device).split(COMPARED)):
            hidden, targets = self.hidden[part].double(), self.targets[part, None]
            flow = (hidden @ weight.T).log_softmax(1)
            if number == 0:
                logps = flow.gather(1, targets)[:, 0]
            flow = flow.exp_().mul_(-grad[part, None]).scatter_add_(1, targets, grad[part, None])
            grad_rows += flow[:, self.columns].T @ hidden
            if number == 0:
                grad_hidden = flow @ weight
        return logps, grad_hidden, grad_rows

    def run(self, logps: Logps, step: str) -> Tensor:
        """Run one pass, and return the scores; gradients are added to those that exist."""
        weight = self.weight if step == "trained" else self.weight.detach()
        self.hidden.grad = None
        head = Head(weight, None, 1.0, None, weight.grad if step == "trained" else None)
        with torch.autocast(weight.device.type, torch.bfloat16), torch.set_grad_enabled(step != "scores"):
            scores = logps(self.hidden, self.targets, head)
        if step != "scores":
            scores.backward(self.grad)
        return scores.detach()

    def errors(self, logps: Logps, step: str) -> tuple[float | None, float | None, float | None]:
        """Return the errors of scores, hidden gradients and weight gradients; None where the pass has no gradient."""
        self.weight.grad = torch.zeros_like(self.weight) if step == "trained" else None
        scores, (exact, grad_hidden, grad_rows) = self.run(logps, step), self.exact
        return (
            (scores[:COMPARED].double() - exact).abs().mean().item(),
            None if self.hidden.grad is None else _relative(self.hidden.grad[:COMPARED], grad_hidden),
            None if self.weight.grad is None else _relative(self.weight.grad[self.columns], grad_rows),
        )


def _relative(found: Tensor, exact: Tensor) -> float:
    return ((found.double() - exact).norm() / exact.norm()).item()


def chunks(hidden: Tensor, targets: Tensor, head: Head) -> Tensor:
    """Return log-probabilities as a CPU computes them."""
    with mock.patch.object(cuda_head, "runs_on", return_value=False):
        return selected_logps(hidden, targets, head)


def tiles(operations: TileOperations, tile: str) -> Logps:
    """Return the function that uses tiles of a size with these operations."""

    def logps(hidden: Tensor, targets: Tensor, head: Head) -> Tensor:
        cuda_head.TILE_TOKENS, cuda_head.TILE_COLUMNS = map(int, tile.split("x"))
        return tiled_logps(hidden, targets, head, dtype=torch.bfloat16, operations=operations)

    return logps


def whole(hidden: Tensor, targets: Tensor, head: Head) -> Tensor:
    """Return log-probabilities from all logits."""
    return -F.cross_entropy(F.linear(hidden, head.weight).float(), targets, reduction="none")


def variants(device: torch.device, sizes_of_tiles: list[str]) -> dict[str, Logps]:
    """Return what is compared; Triton only on CUDA and where it can be imported."""
    operations = {"plain": PLAIN}
    if device.type == "cuda":
        try:
            from offline_kto.kto_core.scoring.head_tiles_triton import TRITON
        except ImportError as error:
            print(f"without Triton: {error}")
        else:
            operations = {"triton": TRITON, "plain": PLAIN}
    tiled = {f"{name} {tile}": tiles(one, tile) for name, one in operations.items() for tile in sizes_of_tiles}
    return {"chunks": chunks, **tiled, "whole": whole}


def milliseconds(run: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Return the median time of a pass."""
    if device.type != "cuda":
        seconds = []
        for _ in range(repeats):
            start = time.perf_counter()
            run()
            seconds.append(time.perf_counter() - start)
        return statistics.median(seconds) * 1e3
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    for start, end in events:
        start.record()
        run()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in events)


def measure(case: Case, size: str, name: str, logps: Logps, step: str, repeats: int) -> Measured:
    """Measure one pass of one variant."""
    device, peak = case.weight.device, None
    try:
        errors = case.errors(logps, step)  # also compiles
        if device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            case.run(logps, step)
            peak = (torch.cuda.max_memory_allocated() - before) / 2**20
        took = milliseconds(lambda: case.run(logps, step), device, repeats)
    except torch.OutOfMemoryError:
        return Measured(size, name, step)
    flop = 2 * PRODUCTS[step] * case.hidden.numel() * len(case.weight)
    return Measured(size, name, step, took, flop / took / 1e9, peak, *errors)


def _two_numbers(pair: str) -> tuple[int, int]:
    first, second = pair.split("x")
    return int(first), int(second)


def _pairs(text: str) -> list[str]:
    pairs = text.split(",")
    try:
        if all(min(_two_numbers(pair)) > 0 for pair in pairs):
            return pairs
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"expected pairs of numbers such as 896x151936,64x512, got {text!r}")


def _device(parser: argparse.ArgumentParser, name: str) -> torch.device:
    try:
        return use_device(resolve_device(name))
    except ModelError as error:
        parser.error(f"{error} A quick test: --device cpu --tokens 64 --sizes 64x512")


def main() -> None:
    """Measure all sizes, and print a table and one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tokens", type=int, default=8192, help="completion tokens of a pass; default: 8192")
    parser.add_argument("--sizes", type=_pairs, default=SIZES, help=f"HIDDENxVOCABULARY,...; default: {SIZES}")
    usual = f"{cuda_head.TILE_TOKENS}x{cuda_head.TILE_COLUMNS}"
    parser.add_argument("--tiles", type=_pairs, default=usual, help=f"TOKENSxCOLUMNS,...; default: {usual}")
    parser.add_argument("--repeats", type=int, default=20, help="default: 20")
    given = parser.parse_args()
    device, found = _device(parser, given.device), []
    compared = variants(device, given.tiles)
    for size in given.sizes:
        hidden_size, vocabulary = _two_numbers(size)
        case = Case(hidden_size, vocabulary, given.tokens, device)
        for name, logps in compared.items():
            found += [measure(case, size, name, logps, step, given.repeats) for step in PRODUCTS]
        del case  # before the next one is made
    header = ["size", "variant", "pass", "ms", "TFLOP/s", "peak MiB", "scores", "hidden", "weight"]
    card = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    print(f"{given.tokens} completion tokens, bfloat16 products, torch {torch.__version__}, {card}")
    print(text_table(header, [one.cells() for one in found]))
    print(json.dumps({"tokens": given.tokens, "device": card, "measured": [asdict(one) for one in found]}))


if __name__ == "__main__":
    main()
