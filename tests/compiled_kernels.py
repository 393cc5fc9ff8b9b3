"""Compile the kernels of the output layer for several GPUs, which needs none, and print a line for each.

    python tests/compiled_kernels.py

A line names the kernel, the GPU's compute capability, the soft-cap, and the instructions of the code that read and write
global memory or spill registers.
"""

import itertools
import re

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from offline_kto.kto_core.scoring import head_tiles_triton

TYPES = {
    "products": "*fp32",
    "targets": "*i64",
    "bias": "*bf16",
    **dict.fromkeys(("stride", "out_stride", "first", "columns", "padded"), "i32"),
    **dict.fromkeys(("largest", "total", "chosen", "logsumexp", "grad"), "*fp32"),
    "out": "*bf16",
}


def compiled(function: triton.JITFunction, capability: int, softcap: float | None) -> str:
    """Return the PTX of a kernel, as compiled when rows are aligned; it was assembled, too."""
    names = function.arg_names
    aligned = [i for i, name in enumerate(names) if name in TYPES and name not in ("first", "columns")]
    source = ASTSource(
        function,
        {name: TYPES.get(name, "constexpr") for name in names},
        constexprs={"scale": 0.5, "softcap": softcap, "block": head_tiles_triton.BLOCK},
        attrs={(i,): [["tt.divisibility", 16]] for i in aligned},
    )
    result = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=head_tiles_triton.LAUNCH)
    assert result.asm["cubin"]
    return result.asm["ptx"]


if __name__ == "__main__":
    kernels = (head_tiles_triton.logsumexp_and_target, head_tiles_triton.logits_to_gradient)
    for kernel, (capability, softcap) in itertools.product(kernels, ((80, None), (90, None), (90, 30.0), (100, 30.0))):
        code = compiled(kernel, capability, softcap)
        memory = sorted(set(re.findall(r"\b(?:ld|st)\.(?:global|local)[.\w:]*", code)))
        print(kernel.__name__, capability, softcap, *memory)
