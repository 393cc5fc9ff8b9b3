"""Store and draw the trials of a sweep with Optuna; with `storage.py` the only module that imports optuna.

A trial's number determines its parameters, so a killed sweep resumes with the same ones. Several machines may share one
storage. Each sweeper claims the next trial, and takes over the trials of a dead sweeper: at once if that one ran on
this machine, else when its heartbeat has not changed for a while.
"""

import contextlib
import copy
import json
import os
import random
import secrets
import socket
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias, TypeVar, cast

from offline_kto.kto_core.errors import ConfigError
from offline_kto.kto_core.redaction import hidden_url, without_secrets
from offline_kto.train.run_records import TrialResult
from offline_kto.train.sweep.config import SweepConfig
from offline_kto.train.sweep.space import Range, Trials
from offline_kto.train.sweep.storage import of_storage, open_storage, said

# Types of optuna are not checked here: the module, a study, a running trial, and a stored trial.
_Optuna: TypeAlias = Any
_Study: TypeAlias = _Optuna
_Handle: TypeAlias = _Optuna
_Frozen: TypeAlias = _Optuna
_T = TypeVar("_T")

STUDY = "kto-sweep"
BEAT_SECONDS = 5.0

# A sweeper whose heartbeat has not changed for this long is considered dead.
GONE_SECONDS = 30.0

_OWNER, _ALIVE, _RESULT = "owner", "alive", "result"
_NOBODY = ""

# Linux draws it at each start of a machine.
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


class StoredResult(TrialResult, total=False):
    """The result of a trial as the study stores it, with what comparisons of trials need. In addition to `TrialResult`:

    Attributes:
        draws: bootstrap replicates of the sweep's metric.
        prompts: held-out prompts of the class that has fewer of them.
    """

    draws: list[float]
    prompts: int


@dataclass(frozen=True)
class TrialRecord:
    """A trial as stored in the study.

    Attributes:
        state: complete, failed, pruned or running.
        value: the metric's value, or None.
        result: the reported result; empty while the trial runs.
    """

    number: int
    state: str
    params: dict[str, object]
    value: float | None
    result: StoredResult


# Parts of the identity that are hashes of rows; see `TrainingData.identity`.
_CACHES = ("cache", "held-out cache")


class Study:
    """The stored trials of a sweep, shared by all of its sweepers.

    Args:
        config: options of the sweep.
        trials: the trials to run.
        url: URL of the storage.
        identity: identifies the cache and the sweep; a study with another identity is an error.

    Raises:
        ConfigError: the storage cannot be opened, or contains another sweep.
    """

    def __init__(self, config: SweepConfig, trials: Trials, url: str, identity: dict[str, object]) -> None:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
        self._optuna, self._config, self._trials = optuna, config, trials
        self.maximize = config.metric != "eval/loss"
        self._me = f"{process_place()}/{os.getpid()}/{secrets.token_hex(4)}"
        self._url, self._identity = url, identity
        self._signs: dict[str, tuple[object, float]] = {}  # per sweeper: the last heartbeat, and when it was first seen
        self._beaten = -BEAT_SECONDS
        self._beats = 0
        with of_storage(url):
            self._storage = self._patiently(lambda: open_storage(url))
            names = [summary.study_name for summary in optuna.get_all_study_summaries(self._storage, False)]
            self._study: _Study = None  # not created yet
            if STUDY in names:
                self._join()
            every: list[_Frozen] = [] if self._study is None else self._study.get_trials(deepcopy=False)
        done = sum(frozen.state.is_finished() for frozen in every)
        if done > trials.count:
            raise ConfigError(
                f"trials: {trials.count}: the sweep already has {done} trials, which are kept. Give --trials {done} or "
                "more, or another --out."
            )

    def begin(self) -> None:
        """Create the study, unless it exists. Until then another sweep may take its place.

        Raises:
            ConfigError: another sweep has begun there in the meantime.
        """
        if self._study is None:
            with of_storage(self._url):
                self._join()
        self.beat()

    def _join(self) -> None:
        """Create the study, or join an existing one."""
        self._study = self._patiently(
            lambda: self._optuna.create_study(
                study_name=STUDY,
                storage=self._storage,
                direction="maximize" if self.maximize else "minimize",
                load_if_exists=True,
                pruner=self._pruner(),
            )
        )
        self._check()

    def _patiently(self, open_it: Callable[[], _T]) -> _T:
        tries = 5
        while True:
            try:
                return open_it()
            except Exception as error:
                # Two machines that create the tables at the same time conflict.
                tries -= 1
                if not tries or isinstance(error, ValueError | TypeError):
                    # A URL of another kind, a parameter that the driver rejects, or tables of another optuna version.
                    if isinstance(error, ValueError | TypeError | RuntimeError):
                        raise ConfigError(f"--storage {hidden_url(self._url)}: {said(self._url, error)}") from error
                    raise
                time.sleep(random.uniform(0.1, 0.5))

    def _check(self) -> None:
        identity = json.loads(json.dumps(self._identity, default=str))  # as the storage returns it
        begun = without_secrets(dict(self._study.user_attrs.get("identity") or {}))
        if not begun:
            self._study.set_user_attr("identity", identity)
            return
        for name, value in identity.items():
            if begun.get(name) == value:
                continue
            heading = f"{hidden_url(self._url)}: contains a sweep that was started with another {name}"
            if name in _CACHES:
                raise ConfigError(
                    f"{heading}, or its rows or labels changed since. Restore it, or start another sweep with another --out (with "
                    "--storage: another database)."
                )
            raise ConfigError(
                f"{heading}: {begun.get(name)!r}, not {value!r}. Give the same value, or another --out (with --storage: another "
                "database)."
            )

    def _pruner(self) -> _Optuna:
        pruners = self._optuna.pruners
        return pruners.MedianPruner() if self._config.pruning == "median" else pruners.NopPruner()

    def beat(self) -> None:
        """Write a heartbeat, if the last one is older than `BEAT_SECONDS`."""
        if time.monotonic() - self._beaten >= BEAT_SECONDS:
            self._beaten, self._beats = time.monotonic(), self._beats + 1
            with of_storage(self._url):
                self._study.set_user_attr(f"{_ALIVE}:{self._me}", self._beats)

    def _is_gone(self, owner: str | None) -> bool:
        if owner == self._me:
            return False
        if owner == _NOBODY:
            return True
        if owner is None:  # a sweeper has just created this trial, or was killed while doing so
            sweepers = [name.partition(":")[2] for name in self._study.user_attrs if name.startswith(f"{_ALIVE}:")]
            return all(self._is_gone(one) for one in sweepers if one != self._me)
        place, _, rest = owner.partition("/")
        if place == process_place() and not _runs(int(rest.split("/")[0])):
            return True
        # Compared by change, not by time: the clocks of two machines may differ.
        sign = self._study.user_attrs.get(f"{_ALIVE}:{owner}")
        known, since = self._signs.get(owner, (None, 0.0))
        if sign != known:
            since = time.monotonic()
            self._signs[owner] = sign, since
        return time.monotonic() - since > GONE_SECONDS

    def next(self) -> "Trial | None":
        """Return a trial to run, or None if there is none at the moment (see `is_done`)."""
        with of_storage(self._url):
            return self._next()

    def _next(self) -> "Trial | None":
        for frozen in self._frozen():
            if frozen.state.name == "RUNNING" and self._is_gone(frozen.user_attrs.get(_OWNER)):
                trial = self._optuna.trial.Trial(self._study, frozen._trial_id)
                if self._claim(trial):
                    return self._opened(trial)
        if len(self._frozen()) >= self._trials.count:
            return None
        trial = self._study.ask()
        if trial.number >= self._trials.count:  # another machine was faster; a longer sweep will run this trial
            return None
        trial.set_user_attr(_OWNER, self._me)
        return self._opened(trial)

    def _claim(self, trial: _Handle) -> bool:
        """Claim a trial and return whether that succeeded; among several claimants, the last one to write wins."""
        trial.set_user_attr(_OWNER, self._me)
        if self._config.storage is not None:
            time.sleep(1.0)
        owner: str = self._study.get_trials(deepcopy=False)[trial.number].user_attrs[_OWNER]
        return owner == self._me

    def _opened(self, trial: _Handle) -> "Trial":
        """Return the trial with its stored parameters, and draw those that are missing.

        They depend on the trial's number and, for tpe, on the results so far.
        """
        frozen = self._study.get_trials(deepcopy=False)[trial.number]
        # Some may have been stored before their sweeper was killed.
        params = {**self._drawn(frozen), **frozen.params}
        samplers = self._optuna.samplers
        self._study.sampler = samplers.PartialFixedSampler(params, samplers.RandomSampler(0))
        return Trial(trial, {name: self._suggest(trial, name) for name in self._trials.space})

    def _drawn(self, frozen: _Frozen) -> dict[str, object]:
        """Draw the parameters of a trial; in a finite space no combination is drawn twice."""
        if self._config.search == "grid":
            return self._trials.point(frozen.number)
        params = {
            name: self._sampler(frozen.number, position).sample_independent(
                self._study, frozen, name, self._distribution(name)
            )
            for position, name in enumerate(self._trials.space)
        }
        points = self._trials.points
        if points is None:
            return params
        tried = {tuple(map(one.params.get, params)) for one in self._frozen() if one.number != frozen.number}
        if tuple(params.values()) not in tried:
            return params
        first = random.Random(self._seed(frozen.number, 0)).randrange(points)
        others = (self._trials.point((first + step) % points) for step in range(points))
        return next((point for point in others if tuple(point.values()) not in tried), params)

    def _seed(self, number: int, position: int) -> int:
        """Return the seed of a trial's option: each has its own sampler, so that draws do not depend on each other."""
        return ((self._config.seed * 1009 + number) * 1_000_003 + position) % 2**32

    def _sampler(self, number: int, position: int) -> _Optuna:
        samplers, seed = self._optuna.samplers, self._seed(number, position)
        if self._config.search == "random":
            return samplers.RandomSampler(seed)
        return samplers.TPESampler(seed=seed, constant_liar=True)

    def _distribution(self, name: str) -> _Optuna:
        entry, distributions = self._trials.space[name], self._optuna.distributions
        if not isinstance(entry, Range) or self._config.search == "grid":
            return distributions.CategoricalDistribution(entry.grid())
        if entry.whole:
            return distributions.IntDistribution(int(entry.low), int(entry.high), log=entry.log)
        return distributions.FloatDistribution(entry.low, entry.high, log=entry.log)

    def _suggest(self, trial: _Handle, name: str) -> object:
        """Record the drawn value of an option."""
        found = self._distribution(name)
        if hasattr(found, "choices"):
            return trial.suggest_categorical(name, found.choices)
        suggest = trial.suggest_int if isinstance(found.low, int) else trial.suggest_float
        return suggest(name, found.low, found.high, log=found.log)

    def falls_behind(self, trial: "Trial", step: int, value: float) -> bool:
        """Record an evaluation and return whether the trial should stop."""
        trial.evaluations[step] = value
        if self._config.pruning == "none":
            return False
        # Stored only at the end: values from before an interruption must not cause pruning.
        with of_storage(self._url):
            frozen = copy.deepcopy(self._study.get_trials(deepcopy=False)[trial.number])
            frozen.intermediate_values = dict(trial.evaluations)
            return bool(self._study.pruner.prune(self._study, frozen))

    def tell(self, trial: "Trial", state: str, value: float | None, result: StoredResult) -> None:
        """Record the end of a trial: complete, pruned or failed."""
        states = self._optuna.trial.TrialState
        found = {"complete": states.COMPLETE, "pruned": states.PRUNED, "failed": states.FAIL}[state]
        # Another sweeper took the trial over and has ended it.
        finished = getattr(self._optuna.exceptions, "UpdateFinishedTrialError", RuntimeError)  # optuna 4.0 has no class
        taken_over = (ValueError, finished)
        with of_storage(self._url), contextlib.suppress(*taken_over), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # "This step is already reported"
            for step, one in trial.evaluations.items():
                trial.handle.report(one, step)
            trial.handle.set_user_attr(_RESULT, result)
            self._study.tell(trial.handle, value if state == "complete" else None, state=found)

    def release(self, trial: "Trial") -> bool:
        """Release a trial to be run once more, and return False if it was released before."""
        with of_storage(self._url):
            if trial.handle.user_attrs.get("released"):
                return False
            trial.handle.set_user_attr("released", True)
            trial.handle.set_user_attr(_OWNER, _NOBODY)
        return True

    def records(self) -> list[TrialRecord]:
        """Return all trials, by number."""
        names = {"COMPLETE": "complete", "PRUNED": "pruned", "FAIL": "failed"}
        return [
            TrialRecord(
                number=frozen.number,
                state=names.get(frozen.state.name, "running"),
                params={name: frozen.params[name] for name in self._trials.space if name in frozen.params},
                value=frozen.value if frozen.state.name != "FAIL" else None,
                result=cast("StoredResult", dict(frozen.user_attrs.get(_RESULT) or {})),
            )
            for frozen in self._frozen()
        ]

    def is_done(self) -> bool:
        """Return whether every trial has ended."""
        records = self.records()
        return len(records) >= self._trials.count and all(record.state != "running" for record in records)

    def best(self) -> TrialRecord | None:
        """Return the trial with the best value; the first one among equals."""
        complete = [record for record in self.records() if record.state == "complete" and record.value is not None]
        sign = -1 if self.maximize else 1
        return min(complete, key=lambda record: sign * (record.value or 0.0), default=None)

    def importance(self) -> dict[str, float] | None:
        """Return the share of the metric's variation that each option explains; None if it cannot be estimated."""
        importance = self._optuna.importance
        try:
            with warnings.catch_warnings():
                # "The number of trials is too small". Of another kind: in optuna 4.0 this evaluator is experimental.
                warnings.simplefilter("error", UserWarning)
                found = importance.get_param_importances(
                    self._study, evaluator=importance.PedAnovaImportanceEvaluator(), normalize=True
                )
        except (ValueError, RuntimeError, ZeroDivisionError, UserWarning):
            return None
        return {name: float(share) for name, share in found.items()}

    def _frozen(self) -> list[_Frozen]:
        if self._study is None:
            return []
        with of_storage(self._url):
            found: list[_Frozen] = self._study.get_trials(deepcopy=False)
        return found[: self._trials.count]


@dataclass(frozen=True)
class Trial:
    """A trial that this process runs."""

    handle: _Handle
    params: dict[str, object]
    evaluations: dict[int, float] = field(default_factory=dict)

    @property
    def number(self) -> int:
        """Number from 0, which interruptions do not change."""
        return int(self.handle.number)


def process_place() -> str:
    """Return the scope in which a process id is unique: this machine since its start, or a container on it."""
    place = socket.gethostname()
    with contextlib.suppress(OSError):
        # Machines made from one image may share a host name, and then a running sweeper would look dead to the other.
        place += f":{_BOOT_ID.read_text().strip()}:{os.stat('/proc/self/ns/pid').st_ino}"
    return place


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
