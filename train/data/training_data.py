"""Choose the training and held-out rows of a run, and list the warnings about them."""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from offline_kto.kto_core.cache.manifest import PROMPT_TOO_LONG, differences
from offline_kto.kto_core.cache.manifest_fields import Identity, RowsIdentity
from offline_kto.kto_core.cache.remote_cache import local_copy, speaking_of
from offline_kto.kto_core.errors import TrainingError
from offline_kto.kto_core.feedback.labels import rare_class
from offline_kto.kto_core.feedback.quoting import counted
from offline_kto.kto_core.locations import Location
from offline_kto.kto_core.models.precision import Precision
from offline_kto.train.config import TrainConfig
from offline_kto.train.data.batches import EpochBatches, split_by_prompt, strata_of, units_of
from offline_kto.train.data.cache_rows import CacheRows
from offline_kto.train.data.held_out import HeldOutRows, check_fraction
from offline_kto.train.data.repeated_rows import contradictions
from offline_kto.train.loss_traits import LOSSES, PAIRED_LOSSES
from offline_kto.train.run_records import RunData, RunRecord


def open_cache(
    cache: Location, max_length: int | None, *, mapped: bool = False, trust_unchanged: bool = False
) -> CacheRows:
    """Open a cache after verifying it; see `CacheRows`. Raises: CacheError: it is damaged, incomplete or missing."""
    folder = local_copy(cache)
    with speaking_of(cache, folder):
        return CacheRows(folder, max_length=max_length, mapped=mapped, trust_unchanged=trust_unchanged)


@dataclass(frozen=True)
class TrainingData:
    """The training and held-out rows of a run.

    Attributes:
        rows: the cache.
        units: which of its rows train, shape (units, rows in each): single rows, or pairs.
        held_out: rows held out, here or in another cache; None if there are none.
        unpaired: rows left out because a loss of pairs cannot use them.
        unjudged: rows left out of training and of held-out values because none of the chosen objectives was judged in them.
    """

    rows: CacheRows
    units: np.ndarray
    held_out: HeldOutRows | None
    unpaired: int = 0
    unjudged: int = 0

    @classmethod
    def open(
        cls, config: TrainConfig, read: Callable[[Location, int | None], CacheRows] | None = None
    ) -> "TrainingData":
        """Open the caches and choose the rows.

        Args:
            config: of the run.
            read: opens a cache; by default as the options say.

        Raises:
            CacheError, TrainingError: unusable caches, a loss that they do not support, or no training or held-out row.
        """
        read = read or functools.partial(open_cache, trust_unchanged=config.trusts_unchanged)
        rows = read(config.cache, config.max_length).judged_by(config.objective_weights)
        train = rows.positions
        held_out: tuple[CacheRows, np.ndarray] | None = None
        if config.eval_cache is not None:
            held = read(config.eval_cache, config.max_length).judged_by(config.objective_weights)
            _same_reference(held, rows.manifest.identity, "--eval-cache", "--cache")
            held_out = held, held.positions
        elif config.eval_fraction:
            seed = config.seed if config.eval_seed is None else config.eval_seed
            check_fraction(config.eval_fraction, rows.prompts)
            train, held_rows = split_by_prompt(rows, config.eval_fraction, seed)
            held_out = rows, held_rows
        judged = train[rows.are_judged(train)]
        if not len(judged):
            raise TrainingError(
                f"--cache {config.cache}: --objective {config.objective} was judged in none of {counted(len(train), 'row')} to train on."
            )
        units = _units(rows, judged, config, f"--cache {config.cache}")
        held_rows_out = held_out and _held_out(*held_out, config)
        left_out, unjudged = len(judged) - units.size, len(train) - len(judged)
        if held_out and held_rows_out:
            left_out += len(held_out[1]) - len(held_rows_out.indices)
            unjudged += int((~held_out[0].are_judged(held_rows_out.indices)).sum())
        return cls(rows, units, held_rows_out, left_out, unjudged)

    def batches(self, config: TrainConfig) -> EpochBatches:
        """Return the optimizer batches of the training rows."""
        strata = strata_of(self.rows, self.units, balance=config.balance and config.shuffle)
        return EpochBatches(strata, config.batch_size, shuffle=config.shuffle, seed=config.seed)

    def identity(self) -> dict[str, RowsIdentity]:
        """Return the hashes that identify the rows used for training and evaluation."""
        caches = {"cache": self.rows, "held-out cache": self.held_out.cache if self.held_out else self.rows}
        return {name: rows.manifest.rows_identity for name, rows in caches.items()}

    @property
    def held_out_cache(self) -> RowsIdentity | None:
        """Identity of the rows of a separate held-out cache; None if there is none."""
        held_out = self.held_out
        return held_out.cache.manifest.rows_identity if held_out and held_out.cache is not self.rows else None

    @property
    def class_counts(self) -> tuple[int, int]:
        """Numbers of desirable and undesirable training rows."""
        desirable = int(self.rows.labels[self.units].sum())
        return desirable, self.units.size - desirable

    @property
    def class_masses(self) -> tuple[float, float]:
        """Desirable and undesirable mass of the training rows; their numbers if every row is one bit of weight 1."""
        if self.rows.masses is None:
            return self.class_counts
        desirable, undesirable = self.rows.masses[self.units.ravel()].sum(axis=0).tolist()
        return desirable, undesirable

    def warnings(self, config: TrainConfig, precision: Precision) -> list[str]:
        """Return one line, with numbers, for each problem with the rows that the user should check."""
        lines = []
        scored = self.rows.manifest.reference.get("dtype")
        if scored != precision.name:
            lines.append(
                f"the cache was scored in {scored}, the policy computes in {precision.name}: rewards do not start at 0, because of "
                f"rounding. kto-precompute --dtype {precision.name} scores in this run's precision."
            )
        if self._eval_cache is not None:
            shared = self._eval_cache.prompt_ids.shared_with(self.rows.prompt_ids)
            if shared:
                are = "is" if shared == 1 else "are"
                lines.append(
                    f"{counted(shared, 'prompt')} of --eval-cache {are} also trained on; held-out values are no measure for new prompts."
                )
        if self.contradictions:
            carry = "carries" if self.contradictions == 1 else "carry"
            lines.append(
                f"{counted(self.contradictions, 'completion')} {carry} both labels for the same prompt; the effects cancel "
                "out. Decide which label is right, or remove them."
            )
        return lines + self._rare_class(config)

    def _rare_class(self, config: TrainConfig) -> list[str]:
        rare = rare_class(*self.class_counts)
        if rare is None:
            return []  # a single class has its own warning
        rarer, total, batches = min(self.class_counts), self.units.size, len(self.batches(config))
        if batches <= rarer:
            return [rare]
        return [
            f"{rare} At least {batches - rarer:,} of {batches:,} batches contain none of them; --batch-size {-(-total // rarer)} "
            "gives each one."
        ]

    @functools.cached_property
    def contradictions(self) -> int:
        """Number of distinct rows of the cache (prompt and completion) that carry both labels."""
        return contradictions(self.rows)

    def run_data(self) -> RunData:
        """Return counts and a sample of lengths, for the report."""
        manifest, (desirable, undesirable) = self.rows.manifest, self.class_counts
        held = np.empty(0, dtype=bool)
        if self.held_out is not None:
            cache, indices = self.held_out.cache, self.held_out.indices
            held = cache.labels[indices[cache.are_judged(indices)]]
        return {
            "files": [str(file.get("name")) for file in manifest.data.get("files") or []],
            "desirable": desirable,
            "undesirable": undesirable,
            "held_out_desirable": int(held.sum()),
            "held_out_undesirable": int((~held).sum()),
            "dropped": self.rows.dropped + (manifest.data.get("dropped") or {}).get(PROMPT_TOO_LONG, 0),
            "unpaired": self.unpaired,
            **self._judgement_data(),
            "contradictory": self.contradictions,
            "max_length": self.rows.max_length,
            "shortened": self.rows.shortened,
            "held_out_shortened": None if self._eval_cache is None else self._eval_cache.shortened,
            **self.rows.lengths,
        }

    def _judgement_data(self) -> RunData:
        """Return what is known of rows that are more than one bit; empty if none is."""
        if self.rows.masses is None:
            return {}
        desirable, undesirable = self.class_masses
        return {"desirable_mass": desirable, "undesirable_mass": undesirable, "unjudged": self.unjudged}

    @property
    def _eval_cache(self) -> CacheRows | None:
        """The separate cache of the held-out rows, if there is one."""
        return None if self.held_out is None or self.held_out.cache is self.rows else self.held_out.cache


def _units(rows: CacheRows, indices: np.ndarray, config: TrainConfig, where: str) -> np.ndarray:
    paired = config.loss in PAIRED_LOSSES
    units = units_of(rows, indices, 2 if paired else 1)
    if paired:
        units = units[~_alike(rows, units)]
    if len(units):
        return units
    unpaired = ", ".join(name for name in LOSSES if name not in PAIRED_LOSSES)
    raise TrainingError(
        f"{where}: --loss {config.loss} compares two completions of one prompt, but no two of its {len(indices):,} rows share a "
        f"pair_id. Feedback with 'chosen' and 'rejected' makes pairs; these losses need none: {unpaired}."
    )


def _alike(rows: CacheRows, pairs: np.ndarray) -> np.ndarray:
    """Return whether both completions of a pair are equal, as scored or as truncated by --max-length, shape (pairs,).

    Such a pair has no preference to learn.
    """
    chosen, rejected = rows.row_ids()[pairs].T
    alike = np.asarray(chosen == rejected)
    for number in np.flatnonzero(rows.cut[pairs].any(axis=1)):  # only rows that were cut are read
        one, other = (rows[int(i)].matched.completion_ids for i in pairs[number])
        alike[number] |= np.array_equal(one, other)
    return alike


def _held_out(cache: CacheRows, indices: np.ndarray, config: TrainConfig) -> HeldOutRows:
    units = _units(cache, indices, config, "held-out rows")
    held_out = HeldOutRows(cache, units.ravel())
    labels = cache.labels[held_out.indices][cache.are_judged(held_out.indices)]
    if not len(labels):
        raise TrainingError(
            f"held-out rows: --objective {config.objective} was judged in none of {counted(len(held_out.indices), 'row')}. Hold out more "
            "of them with --eval-fraction."
        )
    if config.metric == "eval/rewards/margins" and (labels.all() or not labels.any()):
        raise TrainingError(
            f"--metric {config.metric} needs held-out rows of both classes; all {len(labels):,} are "
            f"{'desirable' if labels.all() else 'undesirable'}. Use another --eval-fraction, or --metric eval/loss."
        )
    return held_out


def _same_reference(rows: CacheRows, identity: Identity, cache: str, other: str) -> None:
    lines = differences(rows.manifest.identity, identity)
    lines = [line for line in lines if not line.startswith("tokenization.max_length")]
    if lines:
        raise TrainingError(f"{cache}: scored by another reference than {other}:\n  " + "\n  ".join(lines))


@dataclass(frozen=True)
class RowsToEvaluate:
    """The rows that `--evaluate-only` evaluates.

    Attributes:
        held_out: the rows.
        what: a description of the rows.
        of_run: whether the run itself held them out.
        warning: a sentence for rows whose metrics do not measure quality on new prompts; None for other rows.
    """

    held_out: HeldOutRows
    what: str
    of_run: bool
    warning: str | None = None


def rows_to_evaluate(config: TrainConfig, record: RunRecord, trained_prompts: np.ndarray | None) -> RowsToEvaluate:
    """Return the run's held-out rows if `--cache` is its own, else the rows of `--cache` with prompts not trained on.

    Args:
        config: the run's own, with the cache to evaluate on.
        record: of the run.
        trained_prompts: ids of the prompts it was trained on, dtype `hashing.ID`; None if they are not recorded.

    Raises:
        CacheError, TrainingError: an unusable cache, or one that was scored by another reference.
    """
    read_again = functools.partial(open_cache, trust_unchanged=config.trusts_unchanged)
    rows = read_again(config.cache, config.max_length)
    if rows.manifest.objectives:  # other rows may be judged without objectives
        rows = rows.judged_by(config.objective_weights)
    identity = record.get("identity")
    if isinstance(identity, dict) and not config.allow_different_policy:
        _same_reference(rows, identity, f"--cache {config.cache}", "the run's")
    mine = rows.manifest.rows_identity
    same = mine == {"fingerprint": record.get("fingerprint"), "labels_hash": record.get("labels_hash")}
    if same and (config.eval_fraction or config.eval_cache is not None):

        def read(cache: Location, max_length: int | None) -> CacheRows:
            return rows if cache == config.cache else read_again(cache, max_length)

        held_out = TrainingData.open(config, read).held_out
        assert held_out is not None
        return RowsToEvaluate(held_out, "held out", of_run=True)
    everything = rows.positions
    if trained_prompts is None:
        what = "all of them; there is no record of the rows that the run was trained on"
        return _perhaps_trained_on(_held_out(rows, everything, config), what)
    new = everything[~rows.prompt_ids.among(trained_prompts)]
    day, trained_on = rows.manifest.tokenization.get("rendered_on"), record.get("rendered_on")
    other_day = day and (str(day)[:10] != str(trained_on)[:10] if trained_on else len(new) == len(rows))
    if other_day:
        what = (
            f"all of them; their chat template wrote the date, {str(day)[:10]}, and another one into the run's rows, so it is "
            "unknown which ones it was trained on (kto-precompute --template-date renders for the same day)"
        )
        return _perhaps_trained_on(_held_out(rows, everything, config), what)
    if not len(new):
        trained = _held_out(rows, everything, config)
        count = len(trained.indices)
        warning = (
            f"{count:,} of {count:,} rows have prompts that the run was trained on; these values do not measure held-out "
            "quality. Give a --cache of other prompts, or train with --eval-fraction."
        )
        return RowsToEvaluate(trained, "the run was trained on their prompts", of_run=False, warning=warning)
    left_out = len(rows) - len(new)
    are = "is" if left_out == 1 else "are"
    what = "not trained on" + (
        f"; {counted(left_out, 'row')} that it was trained on {are} left out" if left_out else ""
    )
    return RowsToEvaluate(_held_out(rows, new, config), what, of_run=False)


def _perhaps_trained_on(rows: HeldOutRows, what: str) -> RowsToEvaluate:
    """Return rows of which nobody knows whether the run was trained on them."""
    warning = (
        f"the run may have been trained on any of these {len(rows.indices):,} rows; these values may not measure held-out "
        "quality."
    )
    return RowsToEvaluate(rows, what, of_run=False, warning=warning)
