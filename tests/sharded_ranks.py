"""What FSDP2 needs of its environment, and what two ranks on the CPU need to get it."""

FSDP2 = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
    "ACCELERATE_MIXED_PRECISION": "no",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
}

# The beginning of a program: accelerate takes the ranks on the CPU for accelerators.
AS_ACCELERATORS = """
import accelerate.state as state
from accelerate.utils import DistributedType
real = state.PartialState.__init__
def pretend(self, *arguments, **options):
    real(self, *arguments, **options)
    if self._shared_state.get("distributed_type") == DistributedType.MULTI_CPU:
        self._shared_state["distributed_type"] = self.distributed_type = DistributedType.MULTI_GPU
state.PartialState.__init__ = pretend
import torch.distributed as dist
barrier = dist.barrier
dist.barrier = lambda *a, device_ids=None, **k: barrier(*a, **k)  # gloo knows no devices
"""
