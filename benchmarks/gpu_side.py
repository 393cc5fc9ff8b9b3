"""Train some updates in this process, with kto-train's trainer or with TRL's, and time each of them.

Started by `gpu_report.py`, once for each side, so that no side finds the memory of another::

    python benchmarks/gpu_side.py ours --model DIR --data ROWS --cache REFS --out result.json --options '{"lora_rank": 16}'
    python benchmarks/gpu_side.py trl --model DIR --data ROWS --out result.json --options '{"gradient_checkpointing": false}'

The result has the seconds of each timed update (the device is synchronised around it), the peak of allocated and of
reserved memory during these updates, the memory in use on the card at their end, and the losses. With --profile the
time of the device is divided by kind of kernel.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

if "ours" in sys.argv[1:2]:  # before torch is imported, as in kto-train
    from offline_kto.kto_core.runtime import use_expandable_segments

    use_expandable_segments()

import torch
import transformers

# Parts of the names of CUDA kernels; the first kind that fits counts.
_KERNELS = {
    "attention": ("flash", "fmha", "attention", "sdpa", "cudnn_generated"),
    "matrix products": ("gemm", "cutlass", "nvjet", "cublas", "matmul"),
    "copies": ("memcpy", "memset", "copy_kernel", "direct_copy"),
}

_SHOWN_KERNELS = 60


class Stamps(transformers.TrainerCallback):
    """Times the updates after the warm-up, and profiles them if asked.

    Args:
        warmup: updates that are not counted.
        profiler: started with the first counted update; None for none.
    """

    def __init__(self, warmup: int, profiler: Any = None) -> None:
        self.warmup, self.profiler = warmup, profiler
        self.times: list[float] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        if state.global_step == self.warmup:
            if torch.cuda.is_available():
                torch.cuda.reset_peak_memory_stats()
            if self.profiler is not None:
                self.profiler.start()
        if state.global_step >= self.warmup:
            self.times.append(time.perf_counter())
        if state.global_step == state.max_steps and self.profiler is not None:
            self.profiler.stop()  # before the run checks and saves its weights

    def result(self) -> dict[str, Any]:
        """Return what was measured: seconds, bytes."""
        seconds = [after - before for before, after in zip(self.times, self.times[1:], strict=False)]
        found: dict[str, Any] = {"seconds": seconds, "median_seconds": statistics.median(seconds)}
        if torch.cuda.is_available():
            free, total = torch.cuda.mem_get_info()
            stats = torch.cuda.memory_stats()
            found |= {
                "peak_allocated": torch.cuda.max_memory_allocated(),
                "peak_reserved": torch.cuda.max_memory_reserved(),
                "card_in_use": total - free,
                "retries": stats.get("num_alloc_retries", 0),
            }
        return found


def ours(args: argparse.Namespace, stamps: Stamps) -> dict[str, Any]:
    """Train with kto-train's trainer."""
    from offline_kto.train.config import TrainConfig
    from offline_kto.train.run.inputs import Materials
    from offline_kto.train.run.training_run import TrainingRun

    out = args.out.with_suffix("")
    out.mkdir(parents=True, exist_ok=True)
    config = TrainConfig(
        cache=args.cache,
        out=out,
        batch_size=args.batch_size,
        max_steps=args.warmup + args.updates,
        shuffle=False,
        save_steps=0,
        **args.options,
    )
    materials = Materials()
    run = TrainingRun.set_up(config, out, materials.data(config), materials)
    run.trainer.add_callback(stamps)
    run.train()
    losses = [entry["loss"] for entry in run.trainer.state.log_history if "loss" in entry]
    return {"losses": losses, "max_tokens": run.trainer.policy.max_tokens, "packs": run.trainer.policy.packs}


def trl(args: argparse.Namespace, stamps: Stamps) -> dict[str, Any]:
    """Train with TRL's KTOTrainer; `lora_rank` and `dtype` of the model are options beside KTOConfig's."""
    from datasets import Dataset
    from trl import KTOConfig, KTOTrainer

    options = dict(args.options)
    rank, dtype = options.pop("lora_rank", 0), options.pop("model_dtype", None)
    peft_config = None
    if rank:
        from peft import LoraConfig

        peft_config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
    rows = [json.loads(line) for line in args.data.read_text(encoding="utf-8").splitlines()]
    has_gpu = torch.cuda.is_available()
    settings = {
        "per_device_train_batch_size": min(8, args.batch_size),
        "gradient_accumulation_steps": max(1, args.batch_size // 8),
        "precompute_ref_log_probs": True,
        "bf16": has_gpu,
        "use_cpu": not has_gpu,
        **({"model_init_kwargs": {"dtype": dtype}} if dtype else {}),
        **options,
    }
    config = KTOConfig(
        output_dir=str(args.out.with_suffix("")),
        max_steps=args.warmup + args.updates,
        max_length=args.max_length,
        learning_rate=1e-6,
        lr_scheduler_type="constant",
        train_sampling_strategy="sequential",
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        **settings,
    )
    trainer = KTOTrainer(
        model=str(args.model),
        args=config,
        train_dataset=Dataset.from_list(rows),
        processing_class=transformers.AutoTokenizer.from_pretrained(args.model),
        callbacks=[stamps],
        peft_config=peft_config,
    )
    trainer.train()
    return {"losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]}


def shares_by_kind(profiler: Any, seconds: float) -> dict[str, float]:
    """Return the share of the wall time that each kind of kernel ran, the rest as "idle", and kernels a second."""
    spent: dict[str, float] = defaultdict(float)
    kernels = 0
    for event in profiler.key_averages():
        micro = float(getattr(event, "self_device_time_total", 0.0))
        if micro <= 0 or "cuda" not in str(event.device_type).lower():
            continue
        name = event.key.lower()
        kind = next((kind for kind, parts in _KERNELS.items() if any(part in name for part in parts)), "elementwise")
        spent[kind] += micro / 1e6
        kernels += event.count
    shares = {kind: value / seconds for kind, value in spent.items()}
    return {**shares, "idle": max(0.0, 1 - sum(shares.values())), "kernels a second": kernels / seconds}


def slowest_kernels(profiler: Any, updates: int) -> list[dict[str, Any]]:
    """Return name, milliseconds and calls, both for an update, of the kernels that take the most time."""
    found = [
        {"name": event.key[:160], "ms": event.self_device_time_total / 1e3 / updates, "calls": event.count / updates}
        for event in profiler.key_averages()
        if event.self_device_time_total > 0 and "cuda" in str(event.device_type).lower()
    ]
    return sorted(found, key=lambda kernel: -kernel["ms"])[:_SHOWN_KERNELS]


def main() -> None:
    """Train, measure, write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("side", choices=["ours", "trl"])
    for name in ("--model", "--data", "--cache", "--out"):
        parser.add_argument(name, type=Path, required=name == "--out")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--max-length", type=int, default=1024)
    parser.add_argument("--warmup", type=int, default=5)
    parser.add_argument("--updates", type=int, default=20)
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--options", type=json.loads, default={}, help="JSON: options of TrainConfig, or of KTOConfig")
    args = parser.parse_args()
    profiler = None
    if args.profile:
        kinds = [torch.profiler.ProfilerActivity.CPU]
        kinds += [torch.profiler.ProfilerActivity.CUDA] if torch.cuda.is_available() else []
        profiler = torch.profiler.profile(activities=kinds)
    stamps = Stamps(args.warmup, profiler)
    begun = time.perf_counter()
    found = (ours if args.side == "ours" else trl)(args, stamps)
    found |= stamps.result()
    found["process_seconds"] = time.perf_counter() - begun
    if profiler is not None:
        found["shares"] = shares_by_kind(profiler, stamps.times[-1] - stamps.times[0])
        found["kernels"] = slowest_kernels(profiler, args.updates)
    args.out.write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main()
