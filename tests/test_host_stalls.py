"""What stops the host in an update: copies to the device, and numbers read back from it.

A device that only pretends to compute counts the copies exactly, and raises an error wherever a number would be read. The
backward pass and the optimizer run on the CPU, where reads are counted by the operations that do them.
"""

import traceback
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import forks
import pytest
import torch
import transformers
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from offline_kto.kto_core.scoring import transfer
from offline_kto.kto_core.scoring.sequences import Sequences, pad_sequences
from offline_kto.train.config import TrainConfig
from offline_kto.train.run.train_run import train
from offline_kto.train.trainer.kto_trainer import KTOTrainer

PRETENDING = """
import sys
from types import SimpleNamespace
sys.path.insert(0, TESTS)
import accelerate, numpy as np, torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils import backend_registration
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from models import random_rows, tiny_model
from offline_kto.kto_core.scoring.logps import add_scoring_forward
from offline_kto.kto_core.judgements import ONE_BIT
from offline_kto.train.config import TrainConfig
from offline_kto.train.data.cache_rows import TrainingRow
from offline_kto.train.data.scored_sequences import ScoredSequence
from offline_kto.train.loss_traits import LOSS_TRAITS
from offline_kto.train.trainer.accumulators import Window
from offline_kto.train.trainer.gradient_passes import GradientPasses
from offline_kto.train.trainer.objective import Objective
from offline_kto.train.trainer.policy_scores import PolicyScores
from offline_kto.train.trainer.prepared_policy import PreparedPolicy
from offline_kto.train.trainer.ranks import Ranks
from offline_kto.train.trainer.reference_point import RunningShift, reference_point

class Backend(backend_registration._DummyBackendModule):
    def get_amp_supported_dtype(self):
        return [torch.bfloat16]

backend_registration._setup_privateuseone_for_python_backend("pretended", backend_module=Backend())
device = torch.device("pretended", 0)

class Copies(TorchDispatchMode):
    count = 0
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        from_host = any(isinstance(one, torch.Tensor) and one.device.type == "cpu" for one in args)
        if isinstance(out, torch.Tensor) and out.device == device and from_host:
            self.count += 1
        return out

loss, max_tokens = sys.argv[1], int(sys.argv[2])
rows = random_rows(8, longest=40)
def scored(prompt, completion):
    return ScoredSequence(prompt, completion, -1.0, -np.ones(len(completion), dtype=np.float32))
batch = [
    TrainingRow(i, str(i), ONE_BIT[i % 2 == 0], scored(*row), scored(row[0], rows[(i + 1) % 8][1])) for i, row in enumerate(rows)
]
model = tiny_model("llama")
add_scoring_forward(model)
passes = []
model.model.register_forward_pre_hook(lambda *_: passes.append(torch.is_grad_enabled()))
with FakeTensorMode(allow_non_fake_inputs=True):
    for module in model.modules():
        for name, one in module._parameters.items():
            if one is not None:
                module._parameters[name] = torch.nn.Parameter(torch.empty(one.shape, device=device))
        for name, one in module._buffers.items():
            module._buffers[name] = torch.empty(one.shape, dtype=one.dtype, device=device)
    accelerator = SimpleNamespace(
        process_index=0,
        num_processes=1,
        distributed_type=accelerate.DistributedType.NO,
        gradient_state=SimpleNamespace(_set_sync_gradients=lambda _: None),
        backward=lambda loss: None,  # autograd needs a real device
    )
    policy = PreparedPolicy(model, device, ranks=Ranks(accelerator, sharded=False), max_tokens=max_tokens, rounding=1e-3)
    objective = Objective.of(TrainConfig(loss=loss), (1.0, 1.0))
    scores, gradients = PolicyScores(policy, objective), GradientPasses(policy, objective, accelerator)
    shift = RunningShift() if LOSS_TRAITS[loss].needs_shift else None
    with Copies() as copies:
        reference = reference_point(scores, batch, shift)
        _, outcome, aux_loss = gradients.run(batch, reference, step=1)
        Window().add(outcome, reference, aux_loss)
    assert outcome.losses.device == device
    try:
        bool(outcome.finite.all())
    except DataDependentOutputException:  # so any read above would have failed
        print(copies.count, passes.count(False), passes.count(True))
"""


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["kto", "humanline", "bco", "dpo", "ppo_clip", "orpo"])
@pytest.mark.parametrize("max_tokens", [10**6, 60])
def test_copies_of_an_update(loss: str, max_tokens: int) -> None:
    """One for all scoring passes, and one for all labelled rows, however many passes they take. Nothing is read back."""
    program = PRETENDING.replace("TESTS", repr(str(Path(__file__).parent)))
    done = forks.run(program, loss, max_tokens)
    assert done.returncode == 0, done.stderr[-3000:]
    copies, scoring, labelled = map(int, done.stdout.split())
    scores = loss in ("kto", "humanline", "bco")
    assert copies == (2 if scores else 1)
    if max_tokens == 60:
        assert labelled > 3
        assert scoring > 1 if scores else scoring == 0
    else:
        assert (scoring, labelled) == (int(scores), 1)


class Reads(TorchDispatchMode):
    """Counts numbers that are read from tensors, by operation; the optimizer's step counts are kept on the host anyway."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(function)
        reads = ("aten._local_scalar_dense", "aten.nonzero", "aten.is_nonzero", "aten.equal", "aten.masked_select")
        if name.startswith(reads) and not any("torch/optim" in frame.filename for frame in traceback.extract_stack()):
            self.found[name] += 1
        return function(*args, **(kwargs or {}))


class Lists(TorchFunctionMode):
    """Counts tensors that are read as a whole, into the counter of `Reads`."""

    def __init__(self, found: Counter[str]) -> None:
        super().__init__()
        self.found = found

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in (torch.Tensor.tolist, torch.Tensor.numpy, torch.Tensor.cpu):
            self.found[function.__name__] += 1
        return function(*args, **(kwargs or {}))


@pytest.fixture
def config(cache: Path, tmp_path: Path) -> TrainConfig:
    return TrainConfig(
        cache=cache, out=tmp_path / "run", batch_size=8, max_steps=4, save_steps=0, device="cpu", logging_steps=100
    )


@pytest.mark.parametrize(("max_tokens", "logging_steps"), [(10**6, 100), (100, 100), (10**6, 1)])
def test_reads_of_an_update(
    config: TrainConfig, max_tokens: int, logging_steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One read, before the optimizer's step, however many passes: are losses and gradients finite?

    A log reads twice: the Trainer its loss, and then all metrics at once.
    """
    reads: list[Counter[str]] = []

    class Counting(transformers.TrainerCallback):
        mode: Reads | None = None

        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.mode = Reads()
            self.lists = Lists(self.mode.found)
            self.mode.__enter__()
            self.lists.__enter__()

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if logging_steps > 1:
                self.stop()

        def on_log(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if self.mode is not None:
                self.stop()

        def stop(self) -> None:
            assert self.mode is not None
            self.lists.__exit__(None, None, None)
            self.mode.__exit__(None, None, None)
            reads.append(self.mode.found)
            self.mode = None

    real = KTOTrainer.__init__

    def counted(self: KTOTrainer, **options: Any) -> None:
        real(self, **{**options, "callbacks": [*options["callbacks"], Counting()]})

    monkeypatch.setattr(KTOTrainer, "__init__", counted)
    train(replace(config, max_tokens=max_tokens, logging_steps=logging_steps))
    assert len(reads) == 4
    for found in reads[1:]:  # the first update measures whether prompts are shared
        if logging_steps > 1:
            assert found == {"tolist": 1}, found
        else:  # after the one copy, values of the host are read
            scalars = found.pop("aten._local_scalar_dense.default")
            assert scalars == 2, "the Trainer's loss, and a count on the host"
            assert found == {"tolist": 3, "cpu": 1}, found


def test_one_transfer_gives_the_same_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "_is_host", lambda device: False)
    batch = pad_sequences([(torch.arange(1, 4).numpy(), torch.arange(5).numpy()), (torch.ones(1).numpy(),) * 2])
    other = [
        torch.tensor([0.5, float("nan")], dtype=torch.float64),
        torch.empty(0, dtype=torch.int64),
        torch.tensor(True),
    ]
    moved, numbers, text = transfer.to_device((batch, other, "text"), "cpu")
    assert isinstance(moved, Sequences)
    assert text == "text"
    assert (moved.rows, moved.tokens) == (batch.rows, batch.tokens)
    for one, same in zip([*batch[:6], *other], [*moved[:6], *numbers], strict=True):
        assert one.dtype == same.dtype
        torch.testing.assert_close(same, one, rtol=0, atol=0, equal_nan=True)
        assert one.numel() == 0 or one.data_ptr() != same.data_ptr()


def test_an_update_larger_than_one_transfer(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is copied together, the numbers are the same."""
    config = replace(config, learning_rate=3e-3, max_tokens=200)
    one = train(config)
    monkeypatch.setattr(transfer, "_is_host", lambda device: False)
    monkeypatch.setattr(transfer, "TRANSFER_TOKENS", 150)
    other = train(replace(config, out=config.out.with_name("other")))
    assert (one / "model.safetensors").read_bytes() == (other / "model.safetensors").read_bytes()
