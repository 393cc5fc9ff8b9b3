"""What `--resume` takes up, and what it refuses: folders of others, damaged checkpoints, another optimizer or model."""

import json
import resource
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import transformers
from models import save_tiny

import train.cache_rows
from kto_core.errors import CacheError, ConfigError
from precompute.config import PrecomputeConfig
from precompute.run import precompute
from train.cache_rows import CacheRows
from train.config import TrainConfig
from train.run import train as run_training


@pytest.fixture
def config(cache: Path, tmp_path: Path) -> TrainConfig:
    return TrainConfig(
        cache=cache, out=tmp_path / "run", batch_size=8, max_steps=2, learning_rate=3e-3, save_steps=1, device="cpu"
    )


def files_in(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


class TestFolders:
    @pytest.mark.parametrize("kind", ["a model", "a cache", "a thesis"])
    def test_what_is_no_run_is_left_alone(self, config: TrainConfig, tmp_path: Path, cache: Path, kind: str) -> None:
        out = tmp_path / "taken"
        if kind == "a model":
            save_tiny(out)
        elif kind == "a cache":
            shutil.copytree(cache, out)
        else:
            (out / "_unfinished").mkdir(parents=True)
            for name in ("_unfinished/thesis", ".notes.tmp", "config.yaml", "metrics.jsonl"):
                (out / name).write_text("mine")
        before = files_in(out)
        with pytest.raises(ConfigError, match="it is no run of kto-train"):
            run_training(replace(config, out=out, resume=True))
        assert files_in(out) == before

    def test_a_finished_run_of_another_cache_is_left_alone(
        self, config: TrainConfig, tmp_path: Path, base: Path, feedback: Path
    ) -> None:
        out = run_training(replace(config, save_steps=0))
        before = files_in(out)
        precompute(PrecomputeConfig(model=str(base), data=str(feedback), out=tmp_path / "other", limit=12))
        with pytest.raises(ConfigError, match="started with another cache"):
            run_training(replace(config, save_steps=0, cache=tmp_path / "other", resume=True))
        assert files_in(out) == before

    @pytest.mark.parametrize("out", ["s3://bucket/run", "file:///tmp/run"])
    def test_a_run_is_not_written_to_a_url(
        self, config: TrainConfig, out: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        with pytest.raises(ConfigError, match="local folder"):
            run_training(replace(config, out=Path(out)))
        assert not list(tmp_path.glob("*:*"))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no schedule": (lambda run: (run / "checkpoint-2/scheduler.pt").unlink(), "scheduler.pt"),
    "half an optimizer": (lambda run: cut(run / "checkpoint-2/optimizer.pt"), "optimizer.pt has"),
    "half a random state": (lambda run: cut(run / "checkpoint-2/rng_state.pth"), "rng_state.pth has"),
    "half a configuration": (lambda run: cut(run / "checkpoint-2/config.json"), "config.json has"),
    "no state": (lambda run: (run / "checkpoint-2/trainer_state.json").write_text("[]"), "trainer_state.json has"),
    "no sizes": (lambda run: (run / "checkpoint-2/sizes.json").unlink(), "sizes.json"),
    "sizes of nothing": (lambda run: (run / "checkpoint-2/sizes.json").write_text("[]"), "incomplete checkpoint"),
    "empty facts": (lambda run: (run / "run.json").write_text(""), "nobody knows what the run was started with"),
    "facts of another kind": (lambda run: (run / "run.json").write_text("[]"), "another cache|nobody knows"),
    "no options": (lambda run: (run / "config.yaml").unlink(), "no config.yaml"),
}


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory, base: Path, cache: Path) -> Path:
    out = tmp_path_factory.mktemp("stopped") / "run"
    return run_training(
        TrainConfig(cache=cache, out=out, batch_size=8, max_steps=2, learning_rate=3e-3, save_steps=1, device="cpu")
    )


class TestCheckpoints:
    @pytest.fixture
    def run(self, stopped: Path, config: TrainConfig) -> Path:
        return Path(shutil.copytree(stopped, config.out or ""))

    @pytest.mark.parametrize(("damage", "reason"), DAMAGES.values(), ids=DAMAGES.keys())
    def test_a_damaged_one_is_named(
        self, run: Path, config: TrainConfig, damage: Callable[[Path], object], reason: str
    ) -> None:
        damage(run)
        before = files_in(run)
        with pytest.raises(ConfigError, match=reason):
            run_training(replace(config, max_steps=3, resume=True))
        assert files_in(run) == before

    def test_what_stands_in_its_records_cannot_stop_it(self, run: Path, config: TrainConfig) -> None:
        with (run / "metrics.jsonl").open("ab") as file:
            file.write(b'\xff{"step"\n')
        run_training(replace(config, max_steps=3, resume=True))
        steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
        assert steps == [1, 2, 3, 3]

    @pytest.mark.usefixtures("run")
    @pytest.mark.parametrize(
        ("options", "reason"),
        [
            ({"training": {"optim": "sgd"}}, "another optimizer"),
            ({"training": {"adam_beta1": 0.5}}, "another optimizer"),
            ({"model": "elsewhere"}, "--model None"),
        ],
    )
    def test_it_goes_on_with_the_same_model_and_optimizer(
        self, config: TrainConfig, base: Path, options: dict[str, object], reason: str, tmp_path: Path
    ) -> None:
        if "model" in options:
            options = {"model": str(shutil.copytree(base, tmp_path / "elsewhere"))}
        with pytest.raises(ConfigError, match=reason):
            run_training(replace(config, max_steps=3, resume=True, **options))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("settings", "saved"),
    [
        ({"temperature": 0.6, "top_p": 0.9}, {"do_sample": True, "temperature": 0.6}),
        ({"early_stopping": True}, {"early_stopping": None}),
    ],
)
def test_settings_of_sampling_that_contradict_themselves_do_not_lose_a_run(
    config: TrainConfig, tmp_path: Path, feedback: Path, settings: dict[str, object], saved: dict[str, object]
) -> None:
    """Published models come with them; `transformers` loads but does not save them."""
    base = save_tiny(tmp_path / "base")
    path = base / "generation_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))
    precompute(PrecomputeConfig(model=str(base), data=str(feedback), out=tmp_path / "refs"))
    out = run_training(replace(config, cache=tmp_path / "refs"))
    found = transformers.GenerationConfig.from_pretrained(out).to_diff_dict()
    assert {name: found.get(name) for name in saved} == saved


class TestManyShards:
    def test_more_shards_than_files_may_be_open(self, base: Path, feedback: Path, tmp_path: Path) -> None:
        precompute(PrecomputeConfig(model=str(base), data=str(feedback), out=tmp_path / "refs", rows_per_shard=1))
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (len(list(Path("/proc/self/fd").iterdir())) + 16, hard))
        try:
            assert len(CacheRows(tmp_path / "refs")) == 20
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))

    def test_a_system_that_does_not_allow_them(self, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(train.cache_rows.resource, "getrlimit", lambda _: (64, 64))
        with pytest.raises(CacheError, match="allows 64 open files"):
            CacheRows(cache)
