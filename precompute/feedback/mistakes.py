"""Report feedback that cannot be used: mistakes in rows, unknown labels, no usable row, one class only."""

import itertools
import re
import shlex
from collections import Counter
from collections.abc import Collection, Sequence

from offline_kto.kto_core.errors import FeedbackError, KTOError, nearest
from offline_kto.kto_core.feedback.columns import PROMPTS
from offline_kto.kto_core.feedback.labels import DECIMAL_COMMA, GRADED, SHARE, LabelRule, UnknownLabelError
from offline_kto.kto_core.feedback.left_out import OTHER_SPLIT, RATERS_DISAGREE, UNRATED
from offline_kto.kto_core.feedback.paths import Path, key_path, label_path
from offline_kto.kto_core.feedback.quoting import counted, quoted
from offline_kto.kto_core.feedback.scales import Scale
from offline_kto.precompute.config import PrecomputeConfig
from offline_kto.precompute.feedback.data_format import DataFormat
from offline_kto.precompute.feedback.found import Found
from offline_kto.precompute.feedback.places_found import place_key
from offline_kto.precompute.records.feedback_columns import (
    feedback_columns,
    is_turned_round,
    is_undesirable,
    names_in,
    plain_path,
    reversed_options,
)
from offline_kto.precompute.records.text_files import Record

# Mistakes shown with their place; the others are counted.
_SHOWN = 20
# Records in which the label is looked for.
_LOOKED_AT = 10_000
# Words that YAML reads as true or false.
_YAML_BOOLEANS = frozenset(("yes", "no", "on", "off"))


def mistakes_in_rows(mistakes: Sequence[KTOError], config: PrecomputeConfig, data_format: DataFormat) -> KTOError:
    """Return one error about all mistakes: the first of them with their places; unknown labels together."""
    unknown = [one for one in mistakes if isinstance(one, UnknownLabelError)]
    others = [one for one in mistakes if not isinstance(one, UnknownLabelError)]
    if unknown:
        others.insert(0, _unknown_labels(unknown, config, data_format))
    # Where the records were found: they may be a list inside of a record.
    found = "".join(
        f"\n{note} If the object is itself a record, describe it with --map FILE." for note in data_format.notes
    )
    if len(others) == 1:
        return FeedbackError(f"{others[0]}{found}") if found else others[0]
    shown = "\n".join(f"  {one}" for one in others[:_SHOWN])
    more = f"\n  and {len(others) - _SHOWN:,} more" if len(others) > _SHOWN else ""
    return FeedbackError(
        f"{config.data}: {counted(len(others), 'row')} cannot be used:\n{shown}{more}\n"
        f"Correct them, or leave them out with --on-bad-row skip (--left-out FILE lists them).{found}"
    )


def no_rows(config: PrecomputeConfig, data_format: DataFormat, found: Found) -> FeedbackError:
    """Return the error about data without a row that can be trained on."""
    data, left_out = config.data, found.left_out
    reasons = ", ".join(left_out.in_words()) or "none was found"
    if left_out.counts[OTHER_SPLIT]:
        named = next((split for split in found.splits if re.fullmatch(r"[\w.-]{1,60}", split)), "NAME")
        splits = Scale(Counter({quoted(split): count for split, count in found.splits.items()}))
        return FeedbackError(
            f"{data}: no row of the split {quoted(config.split)} can be used ({reasons}); the column 'split' has "
            f"{splits.in_words()}. Pass --split {named}, or --split all."
        )
    if not left_out.counts[UNRATED]:
        none = (data, "no record", "")
        where, reason, detail = min(left_out.rows, key=lambda one: place_key(one[0]), default=none)
        detail = detail.removeprefix(f"{where}: ")
        first = f"{where}: {reason}{f' ({detail})' if detail else ''}"
        return FeedbackError(
            f"{data}: no row can be used ({reasons}). The first is {first}. --left-out FILE lists them."
        )
    if (one := found.one_count) is not None:
        return FeedbackError(
            f"{data}: no row can be used ({reasons}): there is a column '{one.given}', but no record has a '{one.missing}', and votes need "
            f"both.{nearest(one.missing, [name for name in found.columns if name != one.given])} Add the column, with 0 where there are "
            f"none, or name it: --label-field '{{up: ..., down: ...}}'."
        )
    label = data_format.label_paths
    if label is not None and config.map is None and config.label_field is None:
        assert data_format.mapping is not None
        if label.path is None:
            return FeedbackError(
                f"{data}: no record has a score ({reasons}), as {data_format.mapping.name} would have them. Export the records "
                "with their scores, or join the file of the scores; if another field has the labels, name it with --label-field."
            )
        path = label.path  # the format defines where the label is, so the records are unrated
        return FeedbackError(
            f"{data}: no record has a label ({reasons}). {data_format.mapping.name}: the feedback is read from "
            f"{quoted(path.name_in({}), 200)}. Check that the export contains it, or name another field with --label-field."
        )
    if (nothing := _nothing_at_label(config, data_format)) is not None:
        reasons = f"{reasons}; {nothing}"
    lines = feedback_columns(data_format.records(None))
    if lines:
        shown = "\n".join(f"  {line}" for line in lines)
        return FeedbackError(
            f"{data}: no record has a label ({reasons}). These columns look like feedback:\n{shown}\n"
            "Pass the options of one of them, or describe the file with --map FILE."
        )
    if (sides := _sides_of_a_pair(found.columns)) is not None:
        chosen, rejected = sides
        return FeedbackError(
            f"{data}: no record has a label ({reasons}), but {quoted(rejected)} looks like the rejected side of a pair. Describe the "
            f"file with --map FILE: a line such as `prompt: {_prompt_in(found.columns)}`, and a line "
            f"`pair: {{chosen: {chosen}, rejected: {rejected}}}`."
        )
    names = quoted([name for name, _ in found.columns.most_common()], 200)
    return FeedbackError(
        f"{data}: no record has a label ({reasons}); found {names}. Name the column with --label-field, or "
        "describe the file with --map FILE."
    )


def _sides_of_a_pair(columns: Collection[str]) -> tuple[str, str] | None:
    """Return two columns of which one seems to have the rejected answers; None if none does."""
    for name in columns:
        for mark in ("rejected_", "_rejected", "rejected"):
            other = name.replace(mark, mark.replace("rejected", "chosen")), name.replace(mark, "")
            if mark in name and (chosen := next((one for one in other if one in columns), None)) is not None:
                return key_path(chosen), key_path(name)
    return None


def _prompt_in(columns: Collection[str]) -> str:
    return next((name for name in (*PROMPTS, "instruction", "input") if name in columns), "PROMPT")


def _nothing_at_label(config: PrecomputeConfig, data_format: DataFormat) -> str | None:
    """Return a sentence about the first record if no record has a value at the path of the label; None otherwise."""
    path: Path | None = None
    mapping, label = data_format.mapping, data_format.label_paths
    if mapping is None and config.label_field is not None:
        path = label_path(config.label_field)
    elif (
        mapping is not None and label is not None and mapping.turns is None and mapping.each is None and not mapping.zip
    ):
        path = next(iter(label.paths), None)
    first: tuple[str, Record] | None = None
    for where, record in itertools.islice(data_format.records(None), _LOOKED_AT):
        found = None if path is None else path.find(record, where)
        if path is None or (any(found.values()) if isinstance(found, dict) else found is not None):
            return None
        first = first or (where, record)
    return None if path is None or first is None else f"{first[0]}: {path.nothing(first[1])}"


def one_class(config: PrecomputeConfig, data_format: DataFormat, found: Found) -> FeedbackError:
    """Return the error about rows that are all desirable, or all undesirable."""
    name = "desirable" if found.labels[True] else "undesirable"
    scale = Scale.of(data_format.label_rule)
    values = f" (the values: {scale.in_words()})" if scale.counts else ""
    left_out = ", ".join(found.left_out.in_words())
    more = f" Left out: {left_out}." if left_out else ""
    proposal = scale.proposal()
    advice = (
        f"pass {proposal} if that is the scale"
        if proposal
        else "--up and --down define which values are desirable and undesirable"
    )
    return FeedbackError(
        f"{config.data}: every row is {name}{values}: KTO needs both classes.{more} Check the labels: {advice}. "
        "If this is intended, pass --one-class."
    )


def unclear_rating(config: PrecomputeConfig, name: str) -> FeedbackError:
    """Return the error about a rating that is always 1, which is the best of some scales and the worst of others."""
    field = "" if config.label_field is None else f"--label-field {shlex.quote(config.label_field)} "
    return FeedbackError(
        f"{config.data}: '{name}' is 1 wherever it has a value, so its scale is not known: 1 is the best of 0 and 1, and the "
        f"worst of 1 to 5. Pass {field}--up 1 --down 0 if 1 is good, or {field}--up '>=4' --down '<=2' if it is bad."
    )


def options_of_pairs(config: PrecomputeConfig, data_format: DataFormat, found: Found) -> FeedbackError | None:
    """Return the error about options of labels if all data are preference pairs, which have none; None otherwise."""
    given = " and ".join(data_format.label_options)
    advice = f"Remove {given}, or describe the file with --map FILE if it has another label."
    if given and data_format.mapping is None and set(found.forms) == {"chosen + rejected"}:
        return FeedbackError(
            f"{config.data}: all rows are preference pairs, which have no label, so {given} has no effect. {advice}"
        )
    passed_over = data_format.passed_over
    if passed_over is not None and passed_over.refuse is None and not found.forms:
        return FeedbackError(
            f"{config.data}: recognised by its keys as {passed_over.name}: preference pairs, which have no label, so it cannot be read "
            f"with {given}. {advice}"
        )
    return None


def without_effect(config: PrecomputeConfig, feedback_rule: LabelRule, found: Found) -> FeedbackError | None:
    """Return the error about an option that changes nothing, because no row has what it is about; None without one.

    Args:
        feedback_rule: the rule that has judged all rows.
    """
    if config.votes != SHARE and not found.agreement and not found.left_out.counts[RATERS_DISAGREE]:
        return FeedbackError(
            f"{config.data}: --votes {config.votes} has no effect: no row has votes. They are two numbers ('up' and 'down'), or a "
            "list with a label of each rater. Remove --votes, or name the votes with --label-field."
        )
    destinations = {destination for _, destination in feedback_rule.seen}
    what = "ratings" if config.rating_scale is not None or config.rating_threshold is not None else "labels"
    given = [
        name
        for name, value, used in (
            ("--rating-scale", config.rating_scale, GRADED in destinations),
            ("--rating-threshold", config.rating_threshold, bool(destinations)),
            ("--up", config.up, bool(destinations)),
            ("--down", config.down, bool(destinations)),
        )
        if value is not None and not used
    ]
    if not given:
        return None
    names, has = " and ".join(given), "has" if len(given) == 1 else "have"
    return FeedbackError(
        f"{config.data}: {names} {has} no effect: the rows are judged by numbers of votes, not by {what}. Remove {names}, or name the "
        f"column of the {what} with --label-field."
    )


def missing_split(config: PrecomputeConfig, data_format: DataFormat, found: Found) -> FeedbackError | None:
    """Return the error about a split of a file that has no splits; None without one."""
    if config.split.lower() in ("train", "all") or data_format.has_splits(found.splits):
        return None
    return FeedbackError(
        f"{config.data}: no split {quoted(config.split)}: the file has no column 'split' and no lists of that name. Remove --split, "
        "or pass the file of that split."
    )


def turned_round(config: PrecomputeConfig, rule: LabelRule) -> FeedbackError | None:
    """Return the error about a label whose name says that true is undesirable, as "toxic" does; None without one."""
    values = list(Scale.of(rule).counts)
    if (graded := _graded_turned_round(config)) is not None:
        return graded
    name = next((one for one in rule.numbers if is_turned_round(one, values)), None)
    if name is None:
        return None
    if any(not is_turned_round(one, values) for one in rule.numbers):  # --up and --down would turn the others round
        return FeedbackError(
            f"{config.data}: one of the labels is '{plain_path(name)}', which seems to name what is undesirable, but true, 1 and yes are "
            f"read as desirable ({Scale.of(rule).in_words()}). Describe the file with --map FILE: under `labels`, this one with "
            "`up: [false]` and `down: [true]`, or with the values it has."
        )
    field = "" if config.label_field is None else f"--label-field {shlex.quote(config.label_field)} "
    options = reversed_options(value for value in values if value != "(none)")
    _, up, _, down = shlex.split(options)
    return FeedbackError(
        f"{config.data}: the label is '{name}', which seems to name what is undesirable, but true, 1 and yes are read as desirable "
        f"({Scale.of(rule).in_words()}). Pass {field}{options}, or {field}--up {shlex.quote(down)} --down {shlex.quote(up)} if they "
        "are desirable."
    )


def _graded_turned_round(config: PrecomputeConfig) -> FeedbackError | None:
    """Return the error about a rating of what is undesirable, which an option reads as the better the higher; None without one."""
    options = {"--rating-threshold": config.rating_threshold, "--rating-scale": config.rating_scale}
    option = next((name for name, value in options.items() if value is not None), None)
    names = names_in(config.label_field or "")
    name = next(filter(is_undesirable, names), None)
    if option is None or name is None:
        return None
    if len(names) > 1:
        return FeedbackError(
            f"{config.data}: one of the labels is '{name}', which seems to name what is undesirable, but {option} reads a higher rating as "
            "the more desirable. Describe the file with --map FILE: under `labels`, this one with `up` and `down`."
        )
    field = f"--label-field {shlex.quote(config.label_field or '')}"
    return FeedbackError(
        f"{config.data}: the label is '{name}', which seems to name what is undesirable, but {option} reads a higher rating as the more "
        f"desirable. Pass {field} --up '<=LOW' --down '>=HIGH' with numbers of its scale, or {field} --up '>=HIGH' --down '<=LOW' if "
        "a higher one is better."
    )


def _read_as_booleans(rule: LabelRule, scale: Scale) -> str:
    """Return the words among the labels, in quotes, that YAML reads as true or false where a mapping has no quotes; empty without one."""
    if not any(isinstance(one, bool) for one in (*rule.up, *rule.down)):
        return ""
    return ", ".join(shown for shown in scale.counts if shown.strip('"').lower() in _YAML_BOOLEANS)


def _unknown_labels(
    unknown: Sequence[UnknownLabelError], config: PrecomputeConfig, data_format: DataFormat
) -> KTOError:
    """Return one error about all values that are neither up nor down, with options that fit them."""
    first = unknown[0]
    if first.rule.graded:
        skip = "" if config.on_bad_row == "error" else " --on-bad-row skip does not leave out unknown labels."
        return FeedbackError(f"{first} Write ratings as numbers, or remove --rating-scale and rating-scale.{skip}")
    label = data_format.label_paths
    if label is not None and label.objectives:
        return FeedbackError(
            f"{first} Write up and down, or rating-scale, under the label of this objective in the mapping."
        )
    if len({one.field for one in unknown}) > 1:
        return first
    scale = Scale.of(first.rule)
    if data_format.mapping is not None and data_format.mapping.pair is not None:  # which has no --up and --down
        up, down = (quoted(list(values), 100) for values in (first.rule.up, first.rule.down))
        return FeedbackError(
            f"{first} '{first.field}' has {scale.in_words()}. {data_format.mapping.name}: the first answer is better if it is one of "
            f"{up}, the second if it is one of {down}. A mapping (--map FILE) names other values in a_when and b_when."
        )
    if first.rule.scale and (strays := scale.strays(*first.rule.scale)):
        return FeedbackError(
            f"{first} Correct {strays}: the other ratings are on the scale. It has {scale.in_words()}."
        )
    if data_format.mapping is not None and (words := _read_as_booleans(first.rule, scale)):
        return FeedbackError(
            f"{first} {data_format.mapping.name}: YAML reads yes, no, on and off without quotes as true and false. Put the words of "
            f"up and down in quotes: {words}."
        )
    proposal = "" if is_undesirable(first.field) else scale.proposal()
    usual = first.field in ("label", "kto_tag") and not any(mark in proposal for mark in "<>")  # else of `rating`
    name = "" if data_format.mapping or usual or config.label_field else f"--label-field {shlex.quote(first.field)} "
    is_graded = scale.is_numbers and len(scale.counts) > 2
    graded = " To grade ratings instead of cutting them, give their lowest and highest with --rating-scale." * is_graded
    advice = (
        f"If that is the scale, pass {name}{proposal}.{graded}"
        if proposal
        else "These are usual words for labels: remove --up and --down."
        if scale.is_usual and config.up is not None and config.down is not None
        else "Write decimal numbers with a point."
        if any(DECIMAL_COMMA.fullmatch(value.strip('"')) for value in scale.counts)
        else "Name the desirable values with --up and the undesirable ones with --down"
        f"{', or pass --rating-threshold' * scale.is_numbers}. A mapping (--map FILE) leaves out all others with `else: leave-out`."
    )
    skip = (
        " --on-bad-row skip does not leave out unknown labels: a mapping (--map FILE) does, with `else: leave-out`."
        if config.on_bad_row == "skip"
        else ""
    )
    named = f"'{first.field}'" if first.field == plain_path(first.field) else "It"  # no expression of a preset
    return FeedbackError(f"{first} {named} has {scale.in_words()}. {advice}{skip}")
