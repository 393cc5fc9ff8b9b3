"""What `--cluster` refuses before anything is read."""

import dataclasses
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest

from offline_kto.kto_core.errors import ConfigError
from offline_kto.kto_core.options import as_plain
from offline_kto.precompute.config import PrecomputeConfig
from offline_kto.precompute.ray_workers import RayWorkers, _answer_within, _Node, _Scored, _Worker
from offline_kto.precompute.run import precompute
from offline_kto.precompute.workers import Answer, Answered, Event, Said, Scored, WorkerSettings


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"part": "0/2"}, "remove --part"),
        ({"plan_only": True}, "remove --part and --plan-only"),
        ({"device": "cuda:1"}, "Remove --device cuda:1"),
        ({"device": "all"}, "Remove --device all"),
        ({"out": "s3://bucket/refs"}, "--out must be a folder that all nodes see"),
    ],
)
def test_options_that_contradict_a_cluster_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        PrecomputeConfig(model="base", data="feedback.jsonl", cluster="auto", **options)  # type: ignore[arg-type]


def test_a_machine_without_a_gpu_does_not_choose_for_workers_that_have_one(
    base: Path, feedback: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    config = PrecomputeConfig(model=str(base), data=str(feedback), out=tmp_path / "refs", cluster="auto")
    for named in ({}, {"dtype": "bfloat16"}, {"backend": "transformers"}):
        with pytest.raises(ConfigError, match="Name both, like --dtype bfloat16 --backend transformers"):
            precompute(dataclasses.replace(config, **named))


def test_a_cluster_that_is_not_there_is_told_before_the_feedback_is_read(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ray = pytest.importorskip("ray")

    def init(**options: object) -> None:
        raise ConnectionError("Could not find any running Ray instance.")

    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr("offline_kto.precompute.pipeline.make_plan", pytest.fail)
    config = PrecomputeConfig(model=str(base), data="f.jsonl", out=tmp_path / "refs", cluster="auto", device="cpu")
    with pytest.raises(ConfigError, match="--cluster auto: no Ray cluster can be reached there: Could not find"):
        precompute(config)
    assert list(tmp_path.glob("*.log")) == []


@pytest.mark.parametrize("address", ["head", "", "http://head:1", "head:", ":1", "ray://head", "head:1/x"])
def test_what_is_no_address_is_refused_at_once(address: str) -> None:
    with pytest.raises(ConfigError, match="--cluster: expected auto, HOST:PORT or ray://HOST:PORT, got"):
        PrecomputeConfig(cluster=address)


@pytest.mark.parametrize("address", ["auto", "head:6379", "10.0.0.1:6379", "[::1]:6379", "ray://head.cluster:10001"])
def test_addresses_are_taken(address: str) -> None:
    assert PrecomputeConfig(cluster=address).cluster == address


def test_a_node_is_avoided_and_not_another_of_its_address() -> None:
    workers = RayWorkers.__new__(RayWorkers)
    workers._workers, workers._suspects, started = {}, {}, list[str]()
    nodes = [_Node("bad", "10.0.0.1", 1), _Node("good", "10.0.0.1", 1)]
    workers._nodes = lambda: nodes  # type: ignore[method-assign]
    workers._start = lambda node: started.append(node.id)  # type: ignore[method-assign]
    workers.grow(2, {"bad"})
    assert started == ["good"]


def test_news_add_no_tokens_that_an_answer_has() -> None:
    """A worker counts on from shard to shard; the tokens after its last news are told by its answer."""
    errors = SimpleNamespace(RayTaskError=ZeroDivisionError, RayError=ZeroDivisionError)
    workers = RayWorkers.__new__(RayWorkers)
    workers._ray = SimpleNamespace(get=lambda call: call, exceptions=errors)
    workers._workers = {"w": _Worker(None, _Node("id", "node", 1))}
    answer = Answer(True, 1, 1, "", 1, 20, 1.0, None)

    def take(found: object, method: str) -> list[Event]:
        workers._calls = {found: ("w", method)}
        return [*workers._take(found)]

    assert take((12, ()), "news") == [Scored("w", 12)]
    assert take(_Scored(answer, 20), "score") == [Answered("w", answer)]
    assert take((20, ("a line",)), "news") == [Said("w", "a line")]
    assert take((25, ()), "news") == [Scored("w", 5)]


def test_a_head_that_does_not_answer_is_lost() -> None:
    def refuse() -> None:
        raise ConnectionError("gone")

    assert _answer_within(60.0, lambda: "nodes") == "nodes"
    with pytest.raises(ConnectionError, match="gone"):
        _answer_within(60.0, refuse)
    answered = threading.Event()
    with pytest.raises(TimeoutError):
        _answer_within(0.01, answered.wait)
    answered.set()


def test_workers_get_absolute_paths(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(base.parent)
    config = PrecomputeConfig(model=base.name, data="feedback.jsonl", out=Path("refs"), cluster="auto", workers=3)
    settings = WorkerSettings.of(config, str(config.out))
    assert settings.out == str(base.parent / "refs")
    assert settings.options["model"] == str(base)
    assert WorkerSettings.of(dataclasses.replace(config, model="org/name"), "refs").options["model"] == "org/name"
    # A worker is not a leader.
    assert {"cluster", "workers", "out"} <= {*as_plain(config)} - {*settings.options}
