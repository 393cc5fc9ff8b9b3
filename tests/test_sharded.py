"""Weights spread over ranks: the real FSDP2 (fully_shard through accelerate and the Trainer) on two gloo ranks.

accelerate turns FSDP on for accelerators only. The launcher below tells it that the CPU ranks are such; all that
follows, from sharding to gathering and saving, is the real thing.
"""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from feedback_files import write_rows
from models import save_tiny
from safetensors.torch import load_file

from precompute.config import PrecomputeConfig
from precompute.run import precompute
from train.config import TrainConfig
from train.run import train

pytestmark = pytest.mark.slow

LAUNCHER = """
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
{before}
from train.cli import train
train()
"""

FSDP2 = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
}


def launch(config: TrainConfig, out: Path, *options: str, before: str = "") -> subprocess.CompletedProcess[str]:
    """`kto-train` on two sharded ranks."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone", "--no-python"]
    command += [sys.executable, "-c", LAUNCHER.format(before=before), "--cache", str(config.cache), "--out", str(out)]
    command += ["--batch-size", str(config.batch_size), "--max-steps", str(config.max_steps), "--device", "cpu"]
    command += ["--learning-rate", str(config.learning_rate), "--max-tokens", str(config.max_tokens), *options]
    environment = {**os.environ, **FSDP2}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=False)


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def uneven(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    """Rows of very different lengths: one rank gets two long ones while the other gets many short ones."""
    folder = tmp_path_factory.mktemp("uneven")
    rows = []
    for number in range(18):
        long = number % 6 == 0
        prompt = [{"role": "user", "content": f"{number} " + "hello world " * (30 if long else 1)}]
        completion = [{"role": "assistant", "content": f"{number} " + "red stone " * (25 if long else 2)}]
        rows.append({"prompt": prompt, "completion": completion, "label": number % 2 == 0})
    base = save_tiny(folder / "base", tie_word_embeddings=request.param)
    out = folder / "refs"
    precompute(PrecomputeConfig(model=str(base), data=str(write_rows(folder / "f.jsonl", rows)), out=out))
    return TrainConfig(
        cache=out, out=folder / "one", batch_size=6, max_steps=4, max_tokens=400, learning_rate=3e-3, save_steps=0
    )


def test_two_sharded_ranks_equal_one_process(uneven: TrainConfig, tmp_path: Path) -> None:
    one = train(replace(uneven, out=tmp_path / "one", eval_fraction=0.2))
    done = launch(uneven, tmp_path / "two", "--eval-fraction", "0.2", "--save-steps", "0")
    assert done.returncode == 0, done.stderr[-3000:]
    assert transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "two") is not None
    whole, sharded = (load_file(folder / "model.safetensors") for folder in (one, tmp_path / "two"))
    assert whole.keys() == sharded.keys()
    for name, value in whole.items():
        torch.testing.assert_close(sharded[name], value, atol=2e-5, rtol=0)
