"""The leader, with a transport in memory: queue, losses, refusals, growth, and shards that await others."""

import threading
import time
from collections import deque
from collections.abc import Callable, Collection

import numpy as np
import pytest

from offline_kto.kto_core.errors import CacheError, ModelError
from offline_kto.kto_core.progress import Progress
from offline_kto.precompute.leader import Leader
from offline_kto.precompute.needs import Needs, SequenceIds
from offline_kto.precompute.scoring import without_work
from offline_kto.precompute.worker import RefusedError
from offline_kto.precompute.workers import Answer, Answered, Event, Failed, Lost, Ready, Said, Scored, Task, WorkerPlace

PLACE = WorkerPlace("node", "cpu", "2.0")


def answer(*, is_written: bool = True, tokens: int = 80) -> Answer:
    return Answer(is_written, 4, 100, "hash", scored=8, tokens=tokens, seconds=1.0, difference=None)


class Transport:
    """Workers that are ready at once; `events` says what happens to the shards that are submitted, one after the other."""

    def __init__(self, *events: str, most: int = 2, node: str = "node") -> None:
        self.scripted, self.most, self.node = deque(events), most, node
        self.happened: deque[Event] = deque()
        self.alive: list[str] = []
        self.submitted: list[int] = []
        self.grown: list[int] = []
        self.started = 0

    @property
    def room(self) -> int:
        return self.most

    def grow(self, wanted: int, avoid: Collection[str]) -> int:
        self.grown.append(wanted)
        while len(self.alive) < min(wanted, self.most) and self.node not in avoid:
            self.started += 1
            name = f"w{self.started}"
            self.alive.append(name)
            self.happened.append(self.start(name))
        return len(self.alive)

    def start(self, name: str) -> Event:
        return Ready(name, PLACE)

    def submit(self, worker: str, task: Task) -> None:
        self.submitted.append(task.shard)
        what = self.scripted.popleft() if self.scripted else "written"
        if what in ("lost", "node lost"):
            self.happened.append(Scored(worker, 30))
            self.happened.append(Lost(worker, self.node, "SIGKILL", is_node_alive=what == "lost", log="/tmp/w.log"))
        elif what == "failed":
            self.happened.append(Failed(worker, self.node, ModelError("no memory")))
        else:
            self.happened.append(Said(worker, "padded"))
            self.happened.append(Scored(worker, 50))
            tokens = 60 if what == "resumed" else 80  # a lost worker had flushed 20
            self.happened.append(Answered(worker, answer(is_written=what != "scored", tokens=tokens)))

    def wait(self, seconds: float) -> list[Event]:
        events = [self.happened.popleft()] if self.happened else []
        for event in events:
            if isinstance(event, Lost | Failed):
                self.alive.remove(event.worker)
        return events

    def stop(self) -> None: ...


def led(
    transport: Transport,
    missing: int = 4,
    awaited: dict[int, set[int]] | None = None,
    most: int = 2,
    *,
    prepare: Callable[[int], set[int]] | None = None,
    finished: list[int] | None = None,
) -> tuple[Leader, list[int], Progress]:
    finished = [] if finished is None else finished

    def await_others(index: int) -> set[int]:
        return {one for one in (awaited or {}).get(index, set()) if one not in finished}

    progress = Progress("scoring", 80 * missing, "tokens")
    leader = Leader(
        transport,
        range(missing),
        "refs",
        most=most,
        prepare=prepare or await_others,
        finish=lambda index, found: finished.append(index),
        keep=lambda: None,
        tokens_of=lambda index: 80,
        progress=progress,
    )
    leader.run()
    return leader, finished, progress


def test_every_shard_is_scored_once() -> None:
    transport = Transport()
    leader, finished, progress = led(transport)
    assert sorted(finished) == transport.submitted == [0, 1, 2, 3]
    assert progress.done == 4 * 80  # as the answers say, whatever was told in between
    assert sum(worker["shards"] for worker in leader.worker_fields()) == 4
    assert leader.left == []
    assert max(transport.grown) == 2


def test_a_lost_shard_goes_to_the_front_and_its_worker_is_replaced(capsys: pytest.CaptureFixture[str]) -> None:
    transport = Transport("written", "lost", most=1)
    _, finished, progress = led(transport, most=1)
    assert transport.submitted == [0, 1, 1, 2, 3]
    assert sorted(finished) == [0, 1, 2, 3]
    assert transport.started == 2
    assert progress.done == 4 * 80
    printed = capsys.readouterr().out
    assert "lost        the worker of shard 1 on node ended (SIGKILL); another takes it. Its log: /tmp/w.log" in printed
    assert printed.count("padded") == 1


def test_scores_that_a_lost_worker_flushed_stay_in_the_progress() -> None:
    """Two workers are lost after 30 tokens each; the third scores 60 of the shard's 80."""
    _, finished, progress = led(Transport("lost", "lost", "resumed", most=1), missing=2, most=1)
    assert finished == [0, 1]
    assert progress.done == progress.total == 2 * 80


def test_progress_counts_no_token_of_a_shard_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    counted: list[int] = []
    real = Progress.add
    monkeypatch.setattr(Progress, "add", lambda self, count: (counted.append(count), real(self, count))[1])
    led(Transport("lost", "lost", most=1), missing=1, most=1)  # told 30, 30 and 50
    assert min(counted) >= 0
    assert sum(counted) == 80


def test_three_losses_of_one_shard_stop_the_run() -> None:
    transport = Transport("lost", "lost", "lost", most=1)
    with pytest.raises(ModelError, match=r"^shard 0 was lost 3 times.*node ended \(SIGKILL\).* Its log: /tmp/w\.log"):
        led(transport, most=1)


def test_losses_of_machines_do_not_count() -> None:
    transport = Transport("node lost", "lost", "node lost", "node lost", "lost", most=1)
    assert led(transport, missing=1, most=1)[1] == [0]


def test_an_error_that_the_user_can_fix_ends_the_run() -> None:
    with pytest.raises(ModelError, match=r"^no memory$"):
        led(Transport("written", "failed"))


def test_workers_that_never_become_ready_stop_the_run() -> None:
    class Broken(Transport):
        def start(self, name: str) -> Event:
            return Lost(name, self.node, "exit", is_node_alive=True, log="/tmp/w.log")

    with pytest.raises(ModelError, match=r"3 workers ended before they were ready.* Its log: /tmp/w\.log"):
        led(Broken())


def test_a_machine_whose_worker_is_refused_is_avoided(capsys: pytest.CaptureFixture[str]) -> None:
    class Mixed(Transport):
        """Two machines in turn; one has another model."""

        def grow(self, wanted: int, avoid: Collection[str]) -> int:
            for node in ("bad", "good"):
                self.node = node
                if node not in avoid and node not in self.alive:
                    self.alive.append(node)
                    self.happened.append(self.start(node))
            return len(self.alive)

        def start(self, name: str) -> Event:
            if name == "good":
                return Ready(name, PLACE)
            return Failed(name, name, RefusedError("bad: another model"))

    _, finished, _ = led(Mixed())
    assert sorted(finished) == [0, 1, 2, 3]
    assert capsys.readouterr().out.count("bad: another model") == 1

    class AllBad(Mixed):
        def start(self, name: str) -> Event:
            return Failed(name, name, RefusedError(f"{name}: another model"))

    with pytest.raises(RefusedError, match="another model"):
        led(AllBad())


def test_a_shard_that_awaits_others_is_written_after_them() -> None:
    # Shard 1 needs scores of shard 0, which is lost once; shard 2 needs those of both.
    transport = Transport("lost", "scored", "written", "scored", "written", "written")
    _, finished, _ = led(transport, missing=3, awaited={1: {0}, 2: {0, 1}})
    assert finished[0] == 0
    assert finished.index(1) < finished.index(2)
    assert sorted(transport.submitted) == [0, 0, 1, 1, 2, 2]


def test_plan_files_are_written_ahead_one_for_each_worker() -> None:
    written, ahead = [], []

    class Slow(Transport):
        def wait(self, seconds: float) -> list[Event]:
            deadline = time.monotonic() + 10
            while self.alive and len(written) < min(len(self.submitted) + len(self.alive), 9):
                assert time.monotonic() < deadline
                time.sleep(0.001)
            ahead.append(len(written) - len(self.submitted))
            return super().wait(seconds)

    def prepare(index: int) -> set[int]:
        assert threading.current_thread() is not threading.main_thread()
        written.append(index)
        return set()

    _, finished, _ = led(Slow(), missing=9, prepare=prepare)
    assert sorted(written) == sorted(finished) == [*range(9)]
    assert max(ahead) == ahead[0] == 2
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("plan")]


def test_a_plan_file_is_written_again_if_a_shard_that_it_awaits_was_completed_meanwhile() -> None:
    """One worker: the file of shard 1 is written while shard 0 is scored."""
    written: list[tuple[int, set[int]]] = []
    finished: list[int] = []

    class Slow(Transport):
        def wait(self, seconds: float) -> list[Event]:
            deadline = time.monotonic() + 10
            while len(written) < min(len(self.submitted) + 1, 2):
                assert time.monotonic() < deadline
                time.sleep(0.001)
            return super().wait(seconds)

    def prepare(index: int) -> set[int]:
        awaited = {one for one in range(index) if one not in finished}
        written.append((index, awaited))
        return awaited

    transport = Slow(most=1)
    led(transport, missing=2, most=1, prepare=prepare, finished=finished)
    assert written == [(0, set()), (1, {0}), (1, set())]
    assert transport.submitted == [0, 1]


def test_an_error_of_a_plan_file_ends_the_run() -> None:
    def prepare(index: int) -> set[int]:
        raise CacheError("disk full")

    with pytest.raises(CacheError, match=r"^disk full$"):
        led(Transport(), prepare=prepare)


@pytest.mark.parametrize(
    ("shards", "workers", "rows", "line"),
    [
        (8, 8, 4096 * 8, ""),
        (3, 8, 12_288, "3 shards for 8 workers: 5 have no work; --rows-per-shard 512 makes 24"),
        (7, 8, 28_000, "7 shards for 8 workers: 1 has no work; --rows-per-shard 1024 makes 28"),
        (1, 2, 4096, "1 shard for 2 workers: 1 has no work; --rows-per-shard 512 makes 8"),
        (1, 8, 100, "1 shard for 8 workers: 7 have no work"),  # shards of four rows would not help
        (1, 8, 0, "1 shard for 8 workers: 7 have no work"),
    ],
)
def test_workers_without_work_are_counted_and_smaller_shards_proposed(
    shards: int, workers: int, rows: int, line: str
) -> None:
    assert without_work(shards, workers, rows) == line


def test_other_devices_are_warned_of(capsys: pytest.CaptureFixture[str]) -> None:
    class Mixed(Transport):
        def start(self, name: str) -> Event:
            return Ready(name, PLACE._replace(device=name, node=f"node of {name}"))

    led(Mixed())
    assert "warning     node of w2 scores on w2, other workers on w1" in capsys.readouterr().out


class Rows:
    """A plan whose sequences are given."""

    def __init__(self, rows: list[list[str]]) -> None:
        self.rows = rows

    def sequences(self, index: int) -> list[tuple[np.ndarray, np.ndarray]]:
        return [(np.array([int(name)]), np.array([1, 2])) for name in self.rows[index]]


def test_each_sequence_is_in_the_company_of_one_shard() -> None:
    """Against dictionaries, on random rows with many equal sequences."""
    random = np.random.default_rng(0)
    for _ in range(30):
        rows = [[str(one) for one in random.integers(0, 40, 3)] for _ in range(random.integers(1, 30))]
        size = int(random.integers(1, 12))
        shards = [range(start, min(start + size, len(rows))) for start in range(0, len(rows), size)]
        ids = np.array([[np.void(f"{int(name):016d}".encode()) for name in row] for row in rows], dtype="V16")
        table = SequenceIds(ids, np.full(ids.shape, 3, dtype=np.int32))
        missing = sorted(random.choice(len(shards), random.integers(1, len(shards) + 1), replace=False).tolist())
        needs = Needs(
            Rows(rows),  # type: ignore[arg-type]
            table,
            shards,
            missing=missing,
            keys=[str(i) for i in range(len(shards))],
            files=lambda: [],
        )
        owners: dict[str, int] = {}
        for number in missing:
            for name in (name for i in shards[number] for name in rows[i]):
                owners.setdefault(f"{int(name):016d}".encode().hex(), number)
        assert needs.wanted == len(owners)
        assert needs.unknown_tokens == 3 * len(owners)
        assert len(needs.unscored()) == len(owners)
        for number in missing:
            need, mine = needs.of(number), needs.ids_of(number)
            assert mine == [f"{int(name):016d}".encode().hex() for i in shards[number] for name in rows[i]]
            assert [mine[i] for i in np.flatnonzero(need.in_company)] == [one for one in mine if owners[one] == number]
            company = needs.company(number, need)
            assert list(company) == [one for one in dict.fromkeys(mine) if owners[one] == number]
            assert all(f"{int(x[0]):016d}".encode().hex() == one for one, (x, _) in company.items())
            given = {name: one for name, one in zip(mine, need.scores, strict=True) if one is not None}
            assert {one: scores[0] for one, scores in given.items()} == {one: -float(owners[one]) for one in given}
            assert need.awaited == {owners[one] for one in mine if owners[one] != number and one not in given}
            scores = {one: np.full(2, -float(number), dtype=np.float32) for one in company}
            lent = {one for one in company for other in missing if other > number and one in needs.ids_of(other)}
            at = [mine[place] for place in needs.lent_by(number).tolist()]
            assert (len(at), set(at)) == (len(lent), lent)
            needs.complete(number, [scores[one] for one in at])
            assert needs.of(number).awaited == set()
        assert len(needs.unscored()) == 0
