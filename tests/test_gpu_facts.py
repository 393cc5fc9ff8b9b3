"""g1: the card, the versions and the attention kernels that the other tests marked `gpu` run on."""

import importlib.util

import pytest
import torch
import transformers
from gpus import DEVICE, MARKS, REHEARSAL
from torch.nn.attention import SDPBackend

from offline_kto.kto_core.runtime import deprioritize_cudnn_attention

pytestmark = MARKS

OPTIONAL = (
    "flash_attn",
    "flash_attn_interface",
    "kernels",
    "triton",
    "bitsandbytes",
    "torchao",
    "liger_kernel",
    "vllm",
)


def test_facts_are_printed_and_flash_is_tried_before_cudnn(capsys: pytest.CaptureFixture[str]) -> None:
    deprioritize_cudnn_attention()
    one = torch.ones(1, 1, 64, 64, dtype=torch.bfloat16, device=DEVICE)
    torch.nn.functional.scaled_dot_product_attention(one, one, one)  # the order is decided here
    free, total = torch.cuda.mem_get_info()
    order = [SDPBackend(number).name for number in torch._C._get_sdp_priority_order()]
    found = [name for name in OPTIONAL if importlib.util.find_spec(name) is not None]
    with capsys.disabled():
        print(f"\ncard        {torch.cuda.get_device_name()}, {free / 2**30:.1f} GiB of {total / 2**30:.1f} GiB free")
        print(
            f"versions    torch {torch.__version__}, CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}"
        )
        print(f"            transformers {transformers.__version__}")
        print(f"attention   {', '.join(order)}")
        print(f"packages    {', '.join(found) or 'none of the optional ones'}")
    assert torch.version.cuda is not None or REHEARSAL
    assert torch.cuda.get_device_capability() >= (8, 0), (
        "bfloat16 and flash attention need an Ampere GPU or a later one"
    )
    if "CUDNN_ATTENTION" in order:
        assert order.index("FLASH_ATTENTION") < order.index("CUDNN_ATTENTION") or REHEARSAL
