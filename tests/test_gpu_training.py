"""Training on CUDA devices. Models are tiny, so that each test takes seconds.

The same is tested on the CPU as far as it can be: test_host_stalls.py, test_out_of_memory.py, test_gradient_sums.py,
test_sharded.py, test_determinism.py.
"""

import json
import re
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import forks
import pyarrow.parquet as pq
import pytest
import torch
import transformers
from feedback_files import chat_rows, write_rows
from gpus import DEVICE, MARKS, REHEARSAL, two_gpus
from models import save_tiny, tiny_tokenizer
from safetensors.torch import load_file
from sharded_ranks import AS_ACCELERATORS, FSDP2
from stopped_runs import train_until

from offline_kto.kto_core.scoring import cuda_head
from offline_kto.kto_core.scoring import logps as scoring_logps
from offline_kto.precompute.config import PrecomputeConfig
from offline_kto.precompute.run import precompute
from offline_kto.train.config import TrainConfig
from offline_kto.train.run.train_run import train
from offline_kto.train.trainer.gradient_passes import GradientPasses
from offline_kto.train.trainer.kto_trainer import KTOTrainer
from offline_kto.train.trainer.memory import MOST_TOKENS, state_bytes

pytestmark = MARKS

TRAIN = "from offline_kto.train.cli import train; train()"

# Rounding of bfloat16 passes, on weights of about 0.4 after a few updates of 3e-3.
BFLOAT16 = 2e-2


@pytest.fixture
def config(cache: Path, tmp_path: Path) -> TrainConfig:
    """In float32, so that it can be compared with the CPU."""
    return TrainConfig(
        cache=cache, out=tmp_path / "run", batch_size=8, max_steps=4, learning_rate=1e-3, save_steps=0,
        device=DEVICE.type, dtype="float32", max_tokens=2048,
    )  # fmt: skip


def in_bfloat16(config: TrainConfig) -> TrainConfig:
    return replace(config, dtype="bfloat16", allow_different_policy=True)  # the cache was scored in float32


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(next(run.glob("*model.safetensors")))


def norms(run: Path) -> list[float]:
    records = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [record["grad_norm"] for record in records if "grad_norm" in record]


def difference(one: Path, other: Path) -> float:
    first, second = weights(one), weights(other)
    assert first.keys() == second.keys()
    return max(float((first[name].float() - second[name].float()).abs().max()) for name in first)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_update_reads_from_the_device_once(config: TrainConfig, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once in each update, before the optimizer's step (g7); nothing else makes the host wait for the device."""
    found: list[list[str]] = []

    class Watching(transformers.TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.caught = warnings.catch_warnings(record=True)
            self.messages = self.caught.__enter__()
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            torch.cuda.set_sync_debug_mode("default")
            found.append([str(one.message) for one in self.messages if "synchroniz" in str(one.message).lower()])
            self.caught.__exit__(None, None, None)

    real = KTOTrainer.__init__
    monkeypatch.setattr(
        KTOTrainer, "__init__", lambda self, **o: real(self, **{**o, "callbacks": [*o["callbacks"], Watching()]})
    )
    train(replace(config if dtype == "float32" else in_bfloat16(config), logging_steps=100))
    assert len(found) == 4
    for messages in found[1:-1]:  # the first measures, the last is logged
        assert len(messages) <= 2, messages


@pytest.mark.parametrize("rank", [0, 2], ids=["all weights", "LoRA"])
def test_every_pass_runs_under_autocast(config: TrainConfig, rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """g10: on one GPU, however many there are."""
    found, real = set(), scoring_logps._score

    def noted(*arguments: Any) -> Any:
        found.add(torch.get_autocast_dtype(DEVICE.type) if torch.is_autocast_enabled(DEVICE.type) else None)
        return real(*arguments)

    monkeypatch.setattr(scoring_logps, "_score", noted)
    run = train(replace(in_bfloat16(config), lora_rank=rank))
    assert found == {torch.bfloat16}
    assert json.loads((run / "run.json").read_text())["precision"] == "bfloat16"


@pytest.fixture(scope="module", autouse=True)
def _segments() -> Iterator[None]:
    """Let the allocator grow its segments, as kto-train does; torch reads this at the process's first allocation."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTORCH_ALLOC_CONF", "expandable_segments:True")
        yield


@pytest.fixture(scope="module")
def long_rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The cache of 64 rows of up to 1,024 tokens, of a model that takes about 200 KiB for each of them."""
    folder, size = tmp_path_factory.mktemp("long"), 64 if REHEARSAL else 512
    shape = {"hidden_size": size, "intermediate_size": 3 * size, "num_attention_heads": size // 32}
    base = save_tiny(folder / "base", num_hidden_layers=2 if REHEARSAL else 8, initializer_range=0.05, **shape)
    rows = chat_rows(64, longest=8 if REHEARSAL else 180, seed=1)
    data = write_rows(folder / "rows.jsonl", rows)
    precompute(PrecomputeConfig(model=str(base), data=str(data), out=folder / "refs", device=DEVICE.type))
    return folder / "refs"


@pytest.mark.parametrize(
    ("share_gib", "options"),
    [(4, {}), (4, {"lora_rank": 8}), (1, {"gradient_checkpointing": True})],
    ids=["all weights", "LoRA", "checkpointing"],
)
def test_auto_fills_the_card_and_no_more(
    long_rows: Path, tmp_path: Path, share_gib: int, options: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    """g8: on a share of the card, so that a small model fills it."""
    share, total = share_gib * 2**30, torch.cuda.mem_get_info()[1]
    config = TrainConfig(cache=long_rows, out=tmp_path / "run", batch_size=64, max_steps=5, save_steps=0)
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(share / total)
    torch.cuda.reset_peak_memory_stats()
    retries = torch.cuda.memory_stats()["num_alloc_retries"]
    try:
        train(replace(config, device=DEVICE.type, **options))
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    filled, printed = torch.cuda.max_memory_allocated() / share, capsys.readouterr().out
    measured = re.search(r"--max-tokens (\d+) \(measured\)", printed)
    assert "out of memory" not in printed, f"{filled:.2f} of {share_gib} GiB, {measured}"
    assert torch.cuda.memory_stats()["num_alloc_retries"] == retries
    assert measured or REHEARSAL
    tokens = int(measured[1]) if measured else MOST_TOKENS
    rows = pq.read_table(long_rows / "train").to_pylist()
    assert filled < 0.95
    if tokens < min(
        sum(len(row["prompt_ids"] + row["completion_ids"]) for row in rows), MOST_TOKENS
    ):  # a pass was as large as it may be
        assert filled > 0.7


@pytest.mark.parametrize("where", ["a pass", "the backward pass", "the output layer"])
def test_out_of_memory_repeats_the_batch_with_fewer_tokens(
    config: TrainConfig, where: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """g9: a ballast leaves 64 MiB, and a pass of more than 600 tokens asks for more."""
    if REHEARSAL:  # tiles are used on the CPU as well
        monkeypatch.setattr(cuda_head, "runs_on", lambda device, dtype: True)
    undisturbed = train(config)
    ballast: list[torch.Tensor] = []
    greedy = False
    real, real_flow = GradientPasses.backward, cuda_head._Tiles.flow

    def ask() -> None:
        try:
            if REHEARSAL:
                raise torch.OutOfMemoryError("a rehearsal")
            torch.empty(2**29, dtype=torch.uint8, device=DEVICE)
        finally:
            ballast.clear()

    def backward(self: GradientPasses, loss: torch.Tensor, *, last: bool) -> None:
        nonlocal greedy
        greedy = self.policy.max_tokens > 600
        if greedy:
            torch.cuda.empty_cache()
            free = 2**27 if REHEARSAL else torch.cuda.mem_get_info()[0]
            ballast[:] = [torch.empty(max(0, free - 2**26), dtype=torch.uint8, device=DEVICE)]
            if where == "a pass":
                ask()
            if where == "the backward pass":
                loss.register_hook(lambda _: ask())
        real(self, loss, last=last)

    def flow(self: Any, tile: Any) -> torch.Tensor:
        if greedy and where == "the output layer":
            ask()
        return real_flow(self, tile)

    monkeypatch.setattr(GradientPasses, "backward", backward)
    monkeypatch.setattr(cuda_head._Tiles, "flow", flow)
    before = torch.cuda.memory_allocated()
    run = train(replace(config, out=config.out.with_name("disturbed")))
    assert "out of memory: continuing with --max-tokens 512" in capsys.readouterr().out
    assert difference(undisturbed, run) < 1e-4
    torch.cuda.empty_cache()
    assert torch.cuda.memory_allocated() <= before + 2**20


@pytest.mark.parametrize("rank", [0, 2], ids=["all weights", "LoRA"])
def test_gradient_checkpointing_changes_no_gradient(config: TrainConfig, rank: int) -> None:
    """g11."""
    runs, peaks = [], []
    for checkpointing in (False, True):
        torch.cuda.reset_peak_memory_stats()
        out = config.out.with_name(f"checkpointing-{checkpointing}")
        runs.append(train(replace(config, out=out, lora_rank=rank, gradient_checkpointing=checkpointing)))
        peaks.append(torch.cuda.max_memory_allocated())
    assert difference(*runs) < 1e-4
    assert norms(runs[1]) == pytest.approx(norms(runs[0]), rel=2e-2)
    assert peaks[1] < peaks[0] or REHEARSAL


def test_checkpointed_adapters_of_a_4_bit_base_get_gradients(tmp_path: Path, feedback: Path) -> None:
    """g11: of the first layer too, whose input needs none."""
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    save_tiny(tmp_path / "wide", hidden_size=64, intermediate_size=128)
    four = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    wide = transformers.AutoModelForCausalLM
    model = wide.from_pretrained(tmp_path / "wide", quantization_config=four, device_map={"": DEVICE})
    model.save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    refs = tmp_path / "refs"
    precompute(PrecomputeConfig(model=str(tmp_path / "base"), data=str(feedback), out=refs, device=DEVICE.type))
    config = TrainConfig(cache=refs, out=tmp_path / "run", lora_rank=2, gradient_checkpointing=True, batch_size=8)
    run = train(replace(config, learning_rate=1e-2, max_steps=2, save_steps=0, device=DEVICE.type))
    moved = {name: float(value.abs().max()) for name, value in weights(run).items() if "lora_B" in name}
    assert any(".layers.0." in name for name in moved)
    assert all(moved.values()), moved  # they begin at 0


@pytest.mark.parametrize("exact", [False, True], ids=["as it comes", "full_determinism"])
def test_a_resumed_run_is_near_and_with_full_determinism_equal(
    config: TrainConfig, exact: bool, tmp_path: Path
) -> None:
    """g12; in processes of their own, because cuBLAS reads its setting when it starts."""
    options = ["--config", _yaml(tmp_path, "training: {full_determinism: true}" if exact else "seed: 0")]
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    config = replace(config, save_steps=1)
    done = forks.run(TRAIN, *options_of(config, whole), *options)
    assert done.returncode == 0, done.stderr[-3000:]
    if exact:
        done = forks.run(TRAIN, *options_of(config, stopped), *options)
        assert done.returncode == 0, done.stderr[-3000:]
        (stopped / "model.safetensors").unlink()
        for path in sorted((stopped / "checkpoint-4").iterdir()):
            path.unlink()
        (stopped / "checkpoint-4").rmdir()
    else:
        train_until(replace(config, out=stopped), step=3)
    done = forks.run(TRAIN, *options_of(config, stopped), *options, "--resume")
    assert done.returncode == 0, done.stderr[-3000:]
    assert difference(whole, stopped) <= (0.0 if exact else 1e-4)


def test_two_processes_on_one_gpu_sum_their_gradients() -> None:
    """Over gloo, which copies through the host (g13); NCCL refuses two ranks on one device."""
    program = (
        f"DEVICE = {DEVICE.type!r}\n"
        + """
import torch, torch.distributed as dist
from offline_kto.train.trainer.gradient_sums import GradientSums, Sending, copy_from_first
dist.init_process_group("gloo")
torch.manual_seed(dist.get_rank())
model = torch.nn.Sequential(torch.nn.Linear(300, 200), torch.nn.LayerNorm(200)).to(DEVICE)
copy_from_first(model)
first = model[0].weight.detach().clone()
dist.broadcast(first, src=0)
assert torch.equal(model[0].weight, first)
for dtype in (torch.float32, torch.bfloat16):
    for number, one in enumerate(model.parameters()):
        one.grad = torch.full_like(one, float(number + dist.get_rank()))
    GradientSums(list(model.parameters()), Sending(dtype, 100_000)).finish()
    for number, one in enumerate(model.parameters()):
        assert torch.equal(one.grad, torch.full_like(one, 2.0 * number + 1)), (dtype, number)
dist.destroy_process_group()
"""
    )
    done = forks.run(program, environment={"CUDA_VISIBLE_DEVICES": "0"}, ranks=2)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("optim", ["adamw_torch_fused", "adamw_bnb_8bit"])
def test_optimizers(config: TrainConfig, optim: str) -> None:
    """g14: one update each, near that of the default."""
    if "bnb" in optim:
        pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    config = replace(in_bfloat16(config), max_steps=1)
    one = train(config)
    other = train(replace(config, out=config.out.with_name(optim), training={"optim": optim}))
    assert 0 <= difference(one, other) < 3 * config.learning_rate


@pytest.mark.parametrize(("optim", "bytes_each"), [("adamw_torch_fused", 8), ("adamw_bnb_8bit", 2)])
def test_memory_of_optimizers(optim: str, bytes_each: int) -> None:
    """g14: of the states of a large matrix, as the budget counts them."""
    if "bnb" in optim:
        library = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed").optim
        library.GlobalOptimManager.get_instance().initialize()  # it keeps the `id` of embeddings that are long gone
        optimizer = library.AdamW8bit
    else:
        optimizer = torch.optim.AdamW
    options = {"fused": True} if "fused" in optim else {}
    weight = torch.nn.Parameter(torch.zeros(4096, 1024, device=DEVICE))
    weight.grad = torch.zeros_like(weight)
    counted = state_bytes(optimizer, {"lr": 1e-3, **options}, DEVICE, torch.float32)
    update = optimizer([weight], lr=1e-3, **options)
    before = torch.cuda.memory_allocated()
    update.step()
    allocated = (torch.cuda.memory_allocated() - before) / weight.numel()
    assert counted == pytest.approx(bytes_each, rel=0.05)
    assert allocated == pytest.approx(bytes_each, rel=0.05) or REHEARSAL


@two_gpus
def test_two_gpus_equal_one_process(config: TrainConfig, tmp_path: Path) -> None:
    """g16: the same weights, and no memory for buckets beside the model."""
    one = train(config)
    ddp = "torch.nn.parallel.DistributedDataParallel.__init__"
    before = f"import torch\ndef refuse(*_, **__): raise AssertionError('DDP')\n{ddp} = refuse\n"
    done = forks.run(before + TRAIN, *options_of(config, tmp_path / "two"), ranks=2)
    assert done.returncode == 0, done.stderr[-3000:]
    assert difference(one, tmp_path / "two") < 1e-4


@two_gpus
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("efficient", ["false", "true"])
def test_two_sharded_gpus_equal_one_process(config: TrainConfig, efficient: str, dtype: str, tmp_path: Path) -> None:
    """g17: start check, training and saving under FSDP2."""
    config = config if dtype == "float32" else in_bfloat16(config)
    one = train(config)
    settings = {**FSDP2, "FSDP_CPU_RAM_EFFICIENT_LOADING": efficient}
    program = AS_ACCELERATORS + TRAIN if REHEARSAL else TRAIN
    done = forks.run(program, *options_of(config, tmp_path / "two"), environment=settings, ranks=2)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "policy and cache differ by" in done.stdout
    assert difference(one, tmp_path / "two") < (1e-4 if dtype == "float32" else BFLOAT16)
    assert transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "two") is not None


def _yaml(folder: Path, text: str) -> Path:
    path = folder / "options.yaml"
    path.write_text(text + "\n")
    return path


def options_of(config: TrainConfig, out: Path) -> list[object]:
    """Return options of `kto-train`."""
    options: list[object] = ["--cache", config.cache, "--out", out, "--device", config.device, "--dtype", config.dtype]
    options += ["--batch-size", config.batch_size, "--max-steps", config.max_steps, "--max-tokens", config.max_tokens]
    options += ["--learning-rate", config.learning_rate, "--save-steps", config.save_steps]
    return options + ["--allow-different-policy"] * config.allow_different_policy
