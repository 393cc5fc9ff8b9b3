"""Declare the JSON files of run and sweep folders: one typed record for each, used by its writer and its readers.

Every field may be missing from a file: an older version did not write it, or the run stopped before it was written.
An untrusted file may contain values of any type; `kto-report` checks each value where it displays it.
"""

from typing import Any, TypeAlias, TypedDict

from offline_kto.kto_core.cache.manifest_fields import Identity, ReferenceFields, RowsIdentity

MetricsRecord: TypeAlias = dict[str, float | None]
"""A line of metrics.jsonl: `step` (updates done), then metrics by name; null for a value that is not finite.

A training record has `loss`, `kl`, `kl_raw`, `rewards/*`, `logps/*` (nats), `accuracy` (0 to 1), `learning_rate`,
`grad_norm`, `epoch`, `tokens_per_second` and `peak_memory_mb` (on a GPU also `peak_reserved_mb`); an evaluation the same
metrics as `eval/*`, with `eval/NAME/accuracy` and `eval/NAME/rewards/margins` of each objective; the last record of a run
`train_runtime` (seconds). The evaluation of step 0 is that of the untrained policy. Later ones have the changes since then,
`eval/change/loss` and `eval/change/margin`, with the ends of their paired 95 % intervals, `_low` and `_high`, and
`eval/since_lowest/loss_low`, the lower end for the loss since the evaluation with the lowest one.
"""


class Shortened(TypedDict):
    """Counts of rows that `max_length` dropped or truncated.

    Attributes:
        dropped: int, rows whose prompt leaves no room.
        cut: int, completions that are shortened.
        kl_cut: int, mismatched completions that are shortened.
    """

    dropped: int
    cut: int
    kl_cut: int


class Lengths(TypedDict):
    """Lengths in tokens of the rows of a sample.

    Attributes:
        prompt: list of int.
        desirable: list of int; completions of that class.
        undesirable: list of int; completions of that class.
    """

    prompt: list[int]
    desirable: list[int]
    undesirable: list[int]


class SampledLengths(TypedDict, total=False):
    """Lengths of a sample of rows from the whole cache.

    Attributes:
        sample: int, rows in it.
        truncated: int, rows of it that fill `max_length`.
        lengths: `Lengths`.
    """

    sample: int
    truncated: int
    lengths: Lengths


class RunData(SampledLengths, total=False):
    """The rows that a run uses. In addition to `SampledLengths`:

    Attributes:
        files: list of str; names of the feedback files.
        desirable: int, training rows of that class.
        undesirable: int, training rows of that class.
        held_out_desirable: int, held-out rows of that class.
        held_out_undesirable: int, held-out rows of that class.
        dropped: int, rows dropped because their prompt is too long, when scored or here.
        unpaired: int, rows that a loss of pairs cannot use.
        desirable_mass: float; sum over the training rows, absent if every row is one bit of weight 1.
        undesirable_mass: float; the same.
        unjudged: int, rows left out because no chosen objective was judged in them, absent likewise.
        contradictory: int, different rows that carry both labels.
        max_length: int, tokens.
        shortened: `Shortened`, of the cache.
        held_out_shortened: `Shortened` | null; of another cache with the held-out rows.
    """

    files: list[str]
    desirable: int
    undesirable: int
    held_out_desirable: int
    held_out_undesirable: int
    dropped: int
    unpaired: int
    desirable_mass: float
    undesirable_mass: float
    unjudged: int
    contradictory: int
    max_length: int
    shortened: Shortened
    held_out_shortened: Shortened | None


class FinalUpdate(TypedDict, total=False):
    """How a run ended.

    Attributes:
        step: int; the update whose model was kept.
        updates: int; updates made.
        shift: float, reward; the running mean that bco compares with, absent for other losses.
        seconds_per_update: float; in the process that made the last one, evaluations and checkpoints included; for later plans.
        computed_on: str; number and name of the devices.
    """

    step: int
    updates: int
    shift: float
    seconds_per_update: float
    computed_on: str


class TrainedWith(TypedDict, total=False):
    """The libraries, reference and data that a run, or every trial of a sweep, is trained with.

    Attributes:
        versions: object, library -> version.
        reference: section `reference` of the cache's manifest.
        data: `RunData`.
        warnings: list of str; of the plan.
    """

    versions: dict[str, str] | None
    reference: ReferenceFields | None
    data: RunData | None
    warnings: list[str] | None


class Started(TrainedWith, total=False):
    """The fields that run.json and sweep.json share. In addition to `TrainedWith`:

    Attributes:
        fingerprint: str; of the cache.
        labels_hash: str | null; of the cache.
        command: str; the command line that repeats it.
        started: str, ISO 8601, UTC.
    """

    fingerprint: str
    labels_hash: str | None
    command: str
    started: str | None


class RunRecord(Started, total=False):
    """run.json: the settings a run was started with, and how it ended. In addition to `Started`:

    Attributes:
        identity: object; the fields of the cache's manifest that decide a score.
        rendered_on: str | null, ISO 8601; the time that the chat template wrote into the rows.
        precision: str; float32, bfloat16 or float16.
        held_out_cache: `RowsIdentity` | null; of another cache with the held-out rows.
        device: str; cpu, cuda, ...
        weights: list of two floats; weight of the desirable and of the undesirable class.
        total_updates: int; planned.
        alarms: object; `Settings` of `train.diagnostics.training`, which warnings during the run depend on.
        final: `FinalUpdate`; absent until training has ended.
        trial: int; number in its sweep, only in `best/` of a sweep.
    """

    identity: Identity
    rendered_on: str | None
    precision: str
    held_out_cache: RowsIdentity | None
    device: str
    weights: list[float]
    total_updates: int
    alarms: dict[str, Any]
    final: FinalUpdate
    trial: int


class ComputedWith(TypedDict):
    """The fields of `RunRecord` that are compared when a run is resumed."""

    precision: str
    versions: dict[str, str]
    held_out_cache: RowsIdentity | None


class MetricInterval(TypedDict, total=False):
    """A metric of held-out rows.

    Attributes:
        value: float.
        low: float; lower end of the 95 % bootstrap interval, absent where no resample had a value.
        high: float; upper end.
    """

    value: float
    low: float
    high: float


class VerdictRecord(TypedDict):
    """Whether a model is better than before training.

    Attributes:
        outcome: str; better, no difference or worse.
        by: str; name of the metric that decided, empty if there were too few prompts.
        reason: str; one sentence.
        next: str; what to try next.
    """

    outcome: str
    by: str
    reason: str
    next: str


class GroupRecord(TypedDict, total=False):
    """Held-out metrics of a group of rows; the reference point is that of all rows.

    Attributes:
        by: str; prompt length, class, objective or source file.
        group: str; name of the group.
        rows: int; rows in it, those that were judged by it for an objective.
        accuracy: float; share of mass on the right side of the reference point.
        margin: float | null; reward margin, null if a class has no rows.
        loss: float.
        accuracy_low: float; lower end of the 95 % bootstrap interval over prompts, absent where there is none.
        accuracy_high: float; upper end.
        margin_low: float; the same of the margin.
        margin_high: float.
        accuracy_before: float; the values before training, absent if they are not known.
        margin_before: float | null.
        loss_before: float.
    """

    by: str
    group: str
    rows: int
    accuracy: float
    margin: float | None
    loss: float
    accuracy_low: float
    accuracy_high: float
    margin_low: float
    margin_high: float
    accuracy_before: float
    margin_before: float | None
    loss_before: float


class EvaluationRecord(TypedDict, total=False):
    """evaluation.json: held-out metrics of a finished run.

    Attributes:
        step: int; the update whose model was evaluated.
        loss: str; name of the loss.
        beta: float.
        rows: int; rows evaluated.
        prompts: int; distinct prompts among them.
        resamples: int; bootstrap samples.
        metrics: object, name without `eval/` -> `MetricInterval`.
        before: object, the same of the untrained policy; empty if it is not known.
        change: object, the same of the differences to the untrained policy; intervals are paired.
        verdict: `VerdictRecord` | null; null if the untrained policy's values are not known.
        groups: list of `GroupRecord`; by prompt length, class, objective and source file.
        fingerprint: str; of the cache.
        labels_hash: str | null; of the cache, with `--evaluate-only`.
        rows_are: str; which rows were evaluated, in words, with `--evaluate-only`.
    """

    step: int
    loss: str
    beta: float
    rows: int
    prompts: int
    resamples: int
    metrics: dict[str, MetricInterval]
    before: dict[str, MetricInterval]
    change: dict[str, MetricInterval]
    verdict: VerdictRecord | None
    groups: list[GroupRecord]
    fingerprint: str
    labels_hash: str | None
    rows_are: str


class SampleRecord(TypedDict):
    """A line of samples.jsonl: the greedy completion of a held-out prompt.

    The same prompts are completed at every step. Step 0 is before training, the last step is the saved model.

    Attributes:
        step: int; updates done.
        prompt_id: str; of the cache.
        prompt: str; the text that the model sees, special tokens included.
        completion: str; without the token that ended it.
        ended: bool; false if it was cut at the budget of new tokens.
        tokens: int; tokens generated, the one that ended it included.
    """

    step: int
    prompt_id: str
    prompt: str
    completion: str
    ended: bool
    tokens: int


class TrialResult(TypedDict, total=False):
    """The result of a trial.

    Attributes:
        metrics: object, name -> float; held-out metrics, finite ones only.
        seconds: float, seconds of the whole trial.
        train_seconds: float, seconds of its updates and evaluations.
        reason: str | null; why it failed.
        host: str; name of the machine that ran it.
        folder: str; absolute path of its run folder there.
        interval: `MetricInterval` | null; of the sweep's metric.
        untrained: float | null; the sweep's metric before training.
        verdict: `VerdictRecord` | null; whether it is better than before training.
    """

    metrics: dict[str, float] | None
    seconds: float | None
    train_seconds: float | None
    reason: str | None
    host: str | None
    folder: str | None
    interval: MetricInterval | None
    untrained: float | None
    verdict: VerdictRecord | None


class TrialEntry(TrialResult, total=False):
    """An entry of `trials`. In addition to `TrialResult`:

    Attributes:
        number: int, from 0.
        state: str; complete, pruned, failed or running.
        params: object, option -> value.
        value: float | null; of the sweep's metric.
    """

    number: int
    state: str
    params: dict[str, object]
    value: float | None


class SpaceEntry(TypedDict, total=False):
    """An option of the search space: a list of values, or a range.

    Attributes:
        values: list; of an option that takes one of them.
        low: float; of a range.
        high: float; of a range.
        log: bool; whether a range is searched on a logarithmic scale.
    """

    values: list[object]
    low: float
    high: float
    log: bool


class SweepRecord(Started, total=False):
    """sweep.json: the settings a sweep was started with, and its trials. In addition to `Started`:

    Attributes:
        metric: str; what trials are compared by.
        direction: str; minimize or maximize.
        space: object, option -> `SpaceEntry`.
        seconds: float, seconds of all trials together.
        importance: object, option -> share of the metric's variation (0 to 1) | null; once the sweep has ended.
        best: int | null; number of the best trial.
        planned: int; number of trials.
        trials: list of `TrialEntry`.
        better: list of int; trials that are better than before training.
        tied: list of int; trials that the best one cannot be told from on these held-out rows.
        pareto_front: list of int | null; trials that none beats in all objectives' margins, null without several.
    """

    metric: str
    direction: str
    space: dict[str, SpaceEntry]
    seconds: float
    importance: dict[str, float] | None
    best: int | None
    planned: int
    trials: list[TrialEntry]
    better: list[int]
    tied: list[int]
    pareto_front: list[int] | None
