"""The environment of a launch: what is ignored changes nothing, for the libraries neither, and nothing goes unchecked."""

import ast
import itertools
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

from offline_kto.kto_core.errors import CacheError, ConfigError, KTOError
from offline_kto.kto_core.launch import Launch, read_launch, settle_launch
from offline_kto.precompute.config import PrecomputeConfig
from offline_kto.precompute.run import precompute
from offline_kto.train.cli import train as kto_train
from offline_kto.train.config import TrainConfig
from offline_kto.train.data.cache_rows import CacheRows
from offline_kto.train.run.train_run import train

ROOT = Path(__file__).resolve().parents[1]
MEETING = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29871"}


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch):
    """Set variables; whatever is removed from the environment comes back after the test."""
    before = dict(os.environ)

    def put(**variables: str | None) -> None:
        os.environ.clear()
        os.environ.update(before)
        os.environ.update({name: value for name, value in variables.items() if value is not None})

    yield put
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture
def config(cache: Path, tmp_path: Path) -> TrainConfig:
    return TrainConfig(
        cache=cache, out=tmp_path / "run", batch_size=8, max_steps=2, learning_rate=3e-3, save_steps=0, device="cpu"
    )


@pytest.mark.parametrize("name", ["HF_HUB_ETAG_TIMEOUT", "HF_DATASETS_IN_MEMORY_MAX_SIZE"])
def test_a_number_that_a_library_cannot_read_is_one_message(environment, name: str) -> None:
    environment(**{name: "soon"})
    with pytest.raises(ConfigError, match=f"{name} is 'soon'"):
        settle_launch()
    environment(**{name: "10"})
    settle_launch()


def test_python_without_docstrings_is_one_message() -> None:
    code = "from offline_kto.train.cli import train; train(['--cache', 'refs'])"
    done = subprocess.run([sys.executable, "-OO", "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("Error: Python runs without docstrings")


def test_only_one_module_reads_the_variables_of_a_launch() -> None:
    variables = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    readers = set()
    for path in [path for package in ("kto_core", "precompute", "train") for path in (ROOT / package).rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            named = isinstance(node, ast.Constant) and isinstance(node.value, str)
            if named and (node.value in variables or node.value.startswith(("ACCELERATE_", "FSDP_"))):
                readers.add(path.name)
    assert readers == {"launch.py"}


class TestWhichProcess:
    @pytest.mark.parametrize(
        "ignored",
        [
            {"RANK": "8"},
            {"RANK": "-1"},
            {"LOCAL_RANK": "1"},
            {"LOCAL_RANK": "-1"},
            {"LOCAL_WORLD_SIZE": "4", "LOCAL_RANK": "3"},
            {"RANK": "3", "WORLD_SIZE": "1"},
            {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "1", **MEETING},
            {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "TORCHELASTIC_RUN_ID": "x", **MEETING},
            {"PMI_SIZE": "4", "PMI_RANK": "3"},
            {"PMI_SIZE": "many"},
            {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_LOCAL_RANK": "1"},
            {"MV2_COMM_WORLD_SIZE": "2", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2", **MEETING},
            {"MASTER_ADDR": "nowhere.invalid", "MASTER_PORT": "x"},
        ],
        ids=str,
    )
    def test_what_means_nothing_is_ignored_and_by_accelerate_too(self, environment, ignored: dict[str, str]) -> None:
        from accelerate.state import AcceleratorState, PartialState

        environment(**ignored)
        assert read_launch() == settle_launch() == Launch()
        AcceleratorState._reset_state(reset_partial_state=True)
        try:
            state = PartialState(cpu=True)
            assert (state.num_processes, state.process_index, state.distributed_type.value) == (1, 0, "NO")
        finally:
            AcceleratorState._reset_state(reset_partial_state=True)
        assert not torch.distributed.is_initialized()

    @pytest.mark.parametrize(
        ("variables", "launch"),
        [
            ({"RANK": "1", "WORLD_SIZE": "2"}, Launch(1, 2)),
            ({"RANK": " 1", "WORLD_SIZE": "2 ", "LOCAL_RANK": "1"}, Launch(1, 2, 1)),
            ({"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}, Launch(5, 8, 1)),
            (
                {
                    "RANK": "5",
                    "WORLD_SIZE": "8",
                    "LOCAL_RANK": "0",
                    "LOCAL_WORLD_SIZE": "4",
                    "TORCHELASTIC_RUN_ID": "x",
                },
                Launch(5, 8, 0),
            ),
            (
                {
                    "RANK": "5",
                    "WORLD_SIZE": "8",
                    "LOCAL_RANK": "1",
                    "LOCAL_WORLD_SIZE": "4",
                    "TORCHELASTIC_RUN_ID": "none",
                },
                Launch(5, 8, 1, 4),
            ),
        ],
        ids=str,
    )
    def test_a_launch_is_read(self, environment, variables: dict[str, str], launch: Launch) -> None:
        environment(**variables)
        assert read_launch() == launch

    @pytest.mark.parametrize("name", ["RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"])
    @pytest.mark.parametrize("value", ["", " ", "abc", "1.5", "0x1", "1_0", "\u0663", "-7", "9" * 5000, "\x1b[31m"])
    def test_a_wrong_value_is_one_message(self, environment, config: TrainConfig, name: str, value: str) -> None:
        environment(**{name: value})
        result = CliRunner().invoke(kto_train, ["--cache", str(config.cache), "--out", str(config.out)])
        assert result.exit_code == 1, result.output
        assert result.stderr.startswith(f"Error: {name} is ")
        assert result.stderr.count("\n") == 1
        assert "\x1b" not in result.stderr
        assert not config.out.exists()

    @pytest.mark.parametrize(
        ("variables", "message"),
        [
            ({"WORLD_SIZE": "0"}, "WORLD_SIZE is '0'"),
            ({"WORLD_SIZE": "2"}, "WORLD_SIZE is 2, but RANK is not set"),
            ({"WORLD_SIZE": "2", "RANK": "2"}, "RANK is 2, but WORLD_SIZE 2 counts ranks from 0 to 1"),
            ({"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "4", "LOCAL_WORLD_SIZE": "2"}, "LOCAL_RANK is 4"),
            ({"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "8"}, "LOCAL_WORLD_SIZE 8"),
            ({"WORLD_SIZE": "2", "RANK": "0", "LOCAL_WORLD_SIZE": "2"}, "the other processes cannot be reached"),
            ({"ACCELERATE_USE_FSDP": "maybe"}, "ACCELERATE_USE_FSDP is 'maybe'"),
        ],
        ids=str,
    )
    def test_numbers_that_do_not_go_together_are_one_message(
        self, environment, config: TrainConfig, variables: dict[str, str], message: str
    ) -> None:
        environment(**variables)
        with pytest.raises(ConfigError, match=message):
            train(config)
        assert not config.out.exists()


class TestFolders:
    @pytest.mark.parametrize("variables", [{"RANK": "8"}, {"RANK": "1", "WORLD_SIZE": "1"}], ids=str)
    def test_a_run_or_a_foreign_folder_is_not_written_over(
        self, environment, config: TrainConfig, variables: dict[str, str], tmp_path: Path
    ) -> None:
        finished, notes = train(config), tmp_path / "notes"
        notes.mkdir()
        (notes / "README.md").write_text("mine")
        before = {
            path: path.read_bytes() for folder in (finished, notes) for path in folder.rglob("*") if path.is_file()
        }
        environment(**variables)
        for folder in (finished, notes):
            with pytest.raises(ConfigError, match="the folder is not empty"):
                train(replace(config, out=folder))
        assert {path: path.read_bytes() for path in before} == before

    def test_it_trains_as_if_they_were_not_there(self, environment, config: TrainConfig, tmp_path: Path) -> None:
        plain = load_file(train(config) / "model.safetensors")
        environment(RANK="3", LOCAL_RANK="1", LOCAL_WORLD_SIZE="2", PMI_SIZE="2", PMI_RANK="1")
        ignoring = load_file(train(replace(config, out=tmp_path / "other")) / "model.safetensors")
        assert all(torch.equal(plain[name], ignoring[name]) for name in plain)


class TestVerification:
    @pytest.fixture(scope="class")
    def damaged(self, base: Path, feedback: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
        """Caches of four shards; in each another one has a flipped bit in its scores."""
        folder = tmp_path_factory.mktemp("damaged")
        precompute(PrecomputeConfig(model=str(base), data=str(feedback), out=folder / "whole", rows_per_shard=5))
        copies = []
        for number in range(4):
            copies.append(shutil.copytree(folder / "whole", folder / f"{number}"))
            shard = copies[-1] / "train" / f"{number:05d}.parquet"
            content = bytearray(shard.read_bytes())
            content[len(content) // 3] ^= 1
            shard.write_bytes(content)
        return copies

    def test_a_damaged_cache_is_refused_whatever_is_set(self, environment, damaged: list[Path]) -> None:
        """Check the whole cache where one process works, or nobody guarantees that the ranks divide it."""
        values = (None, "", "-1", "0", "1", "2", "7")
        worlds = (None, "", "1", "2")
        for rank, local, local_world, world in itertools.product(values, values, values, worlds):
            environment(RANK=rank, LOCAL_RANK=local, LOCAL_WORLD_SIZE=local_world, WORLD_SIZE=world, **MEETING)
            try:
                assert read_launch().local_share == (0, 1)
            except ConfigError:
                continue  # refused, before a cache is opened
        for variables in ({"LOCAL_RANK": "1"}, {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}, {"RANK": "9"}):
            environment(**variables)
            for cache in damaged:
                with pytest.raises(CacheError, match="sha256"):
                    CacheRows(cache)

    def test_ranks_of_torchrun_check_all_of_it_together(self, environment, damaged: list[Path]) -> None:
        for cache in damaged:
            refused = 0
            for rank in range(6):  # two machines of three
                here = {"LOCAL_RANK": f"{rank % 3}", "LOCAL_WORLD_SIZE": "3", "TORCHELASTIC_RUN_ID": "none"}
                environment(RANK=f"{rank}", WORLD_SIZE="6", **here)
                try:
                    CacheRows(cache)
                except CacheError:
                    refused += 1
            assert refused == 2  # one on each machine

    @pytest.mark.parametrize(
        "variables", [{"LOCAL_RANK": "1", "RANK": "0", "WORLD_SIZE": "1", **MEETING}, {"LOCAL_RANK": "3"}], ids=str
    )
    def test_nothing_is_trained_on_it(
        self, environment, config: TrainConfig, damaged: list[Path], variables: dict[str, str]
    ) -> None:
        environment(**variables)
        with pytest.raises(CacheError, match="sha256"):
            train(replace(config, cache=damaged[0]))


class TestNumbers:
    """Variables that would make libraries compute something else: the options decide."""

    CHANGES = (
        {"ACCELERATE_MIXED_PRECISION": "bf16"},
        {"ACCELERATE_MIXED_PRECISION": "fp8"},
        {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"},
        {"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR", "ACCELERATE_DYNAMO_MODE": "max-autotune"},
        {"ACCELERATE_USE_PARALLELISM_CONFIG": "true", "PARALLELISM_CONFIG_DP_SHARD_SIZE": "2"},
        {"ACCELERATE_USE_MEGATRON_LM": "true"},
        {"ACCELERATE_TORCH_DEVICE": "meta"},
        {"ACCELERATE_SOMETHING_NEW": "1"},
        {"ACCELERATE_DEBUG_MODE": "much"},
        {"NVIDIA_TF32_OVERRIDE": "1"},
        {"TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": "1"},
        {"DNNL_DEFAULT_FPMATH_MODE": "BF16"},
        {"ONEDNN_DEFAULT_FPMATH_MODE": "any"},
        {"TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "1"},
    )

    @pytest.mark.parametrize("variables", CHANGES, ids=str)
    def test_they_are_removed_and_it_is_said(
        self, environment, capsys: pytest.CaptureFixture[str], variables: dict[str, str]
    ) -> None:
        environment(**variables)
        settle_launch(shards=True)
        assert not set(variables) & set(os.environ)
        lines = capsys.readouterr().out.splitlines()
        name, value = next(iter(variables.items()))
        assert any(line.startswith(f"warning     {name}={value} is ignored: ") for line in lines), lines
        settle_launch(shards=True)
        assert capsys.readouterr().out == ""

    def test_a_precision_that_torch_took_from_the_environment_goes_too(self, environment) -> None:
        before = torch.get_float32_matmul_precision()
        try:
            torch.set_float32_matmul_precision("high")  # as torch does where the variable is set
            environment(TORCH_ALLOW_TF32_CUBLAS_OVERRIDE="1")
            settle_launch()
            assert torch.get_float32_matmul_precision() == "highest"
        finally:
            torch.set_float32_matmul_precision(before)

    def test_what_asks_for_nothing_goes_in_silence(self, environment, capsys: pytest.CaptureFixture[str]) -> None:
        """Set what `accelerate launch` always sets."""
        environment(
            ACCELERATE_MIXED_PRECISION="no",
            ACCELERATE_DYNAMO_BACKEND="NO",
            ACCELERATE_DYNAMO_MODE="default",
            ACCELERATE_DYNAMO_USE_FULLGRAPH="False",
            ACCELERATE_USE_CPU="False",
            ACCELERATE_GRADIENT_ACCUMULATION_STEPS="1",
            ACCELERATE_CPU_AFFINITY="0",
        )
        settle_launch()
        assert capsys.readouterr().out == ""
        assert os.environ["ACCELERATE_CPU_AFFINITY"] == "0"

    @pytest.mark.slow
    @pytest.mark.parametrize(("dtype", "asked"), [("float32", "bf16"), ("bfloat16", "fp16")])
    def test_dtype_alone_decides(
        self, environment, config: TrainConfig, dtype: str, asked: str, tmp_path: Path
    ) -> None:
        config = replace(config, dtype=dtype, max_steps=1, allow_different_policy=True)
        plain = train(config)
        environment(
            ACCELERATE_MIXED_PRECISION=asked,
            ACCELERATE_GRADIENT_ACCUMULATION_STEPS="3",
            ACCELERATE_DYNAMO_BACKEND="EAGER",
        )
        run = train(replace(config, out=tmp_path / "other"))
        assert json.loads((run / "run.json").read_text())["precision"] == dtype
        one, other = (load_file(folder / "model.safetensors") for folder in (plain, run))
        assert all(torch.equal(one[name], other[name]) for name in one)

    def test_settings_of_sharding_stay_where_weights_may_be_sharded(self, environment) -> None:
        settings = {"ACCELERATE_USE_FSDP": "1", "FSDP_VERSION": "2", "FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}
        launch = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}
        environment(**settings, **launch)
        settle_launch(shards=True)
        assert {name: os.environ[name] for name in settings} == {**settings, "ACCELERATE_USE_FSDP": "true"}
        # A scoring rank would leave its weights unread, because rank 0 of FSDP were to send them.
        settle_launch()
        assert not set(settings) & set(os.environ)

    @pytest.mark.parametrize("asks", ["ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"])
    @pytest.mark.parametrize("launch", [{}, {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", **MEETING}], ids=str)
    def test_sharding_that_cannot_be_is_refused(
        self, environment, config: TrainConfig, asks: str, launch: dict[str, str]
    ) -> None:
        environment(**{asks: "true"}, **launch)
        with pytest.raises(KTOError):
            train(config)
