"""Declare the fields of `manifest.json`: one typed record for each section, and checks of the values that are read.

Sections are open: an older cache may lack a field, and a newer version may add one. `CHECKS` lists the values that are
checked.
"""

import math
from collections.abc import Callable, Mapping
from typing import TypeAlias, TypedDict

from offline_kto.kto_core.judgements import MASS_COLUMNS, OBJECTIVES

Identity: TypeAlias = dict[str, object]
"""`section.field` -> value of the fields that decide a score."""


class ReferenceFields(TypedDict, total=False):
    """Section `reference`: the model that was scored.

    Attributes:
        id: str; the model as `--model` named it: a folder or a hub id.
        revision: str | null; the hub commit, null for a folder.
        path: str | null; absolute path of the model's folder when it was scored, null for a model of the hub.
        adapter_path: str | null; the same for the adapter, null without one.
        weights_hash: str; SHA-256 over the weights, in hex.
        config_hash: str; SHA-256 over the config, and over the model's code if that was run.
        adapter: str | null; the adapter as `--adapter` named it.
        adapter_hash: str | null; SHA-256 over the adapter's weights and settings.
        quantization: object | null; `quantization_config` of the model's config.
        dtype: str; precision of the forward passes: float32, bfloat16 or float16.
        attention: str; the model's own attention implementation in Transformers.
        vocabulary: int, tokens; size of the embedding table, which bounds the token ids.
        model_type: str; `model_type` of the model's config, only together with `unread`.
        unread: object, kind -> number of tensors in the files that are not part of the scored model.
    """

    id: str
    revision: str | None
    path: str | None
    adapter_path: str | None
    weights_hash: str
    config_hash: str
    adapter: str | None
    adapter_hash: str | None
    quantization: dict[str, object] | None
    dtype: str
    attention: str
    vocabulary: int
    model_type: str
    unread: dict[str, int]


class TokenizerFields(TypedDict, total=False):
    """Section `tokenizer`: the tokenizer that turned text into token ids.

    Attributes:
        files_hash: str; SHA-256 over the tokenizer's content, in hex.
        chat_template_hash: str | null; SHA-256 over its chat template, null without one.
        options: object, name -> bool or number; `--tokenizer-options`, absent without them.
        chat_template: str or object, name -> str; the template that options chose, absent without them.
        chat_template_kwargs: object; the settings that were written into that template.
    """

    files_hash: str
    chat_template_hash: str | None
    options: dict[str, object]
    chat_template: str | dict[str, str] | None
    chat_template_kwargs: dict[str, object]


class TokenizationFields(TypedDict, total=False):
    """Section `tokenization`: the rules by which rows were truncated.

    Attributes:
        max_length: int, tokens; limit of prompt and completion together.
        rule: int; version of the tokenization rules.
        rendered_on: str, ISO 8601; the time that the chat template wrote into the rows, absent if it writes none.
        chat: bool; true if plain text was turned into conversations, absent under `--chat never` or without a template.
    """

    max_length: int
    rule: int
    rendered_on: str
    chat: bool


class PairingFields(TypedDict, total=False):
    """Section `pairing`: how mismatched completions were chosen.

    Attributes:
        method: str; shuffled or rotate.
        seed: int | null; of shuffled.
        block: int | null, rows; of rotate.
        partners: int; mismatched completions of each row.
    """

    method: str
    seed: int | None
    block: int | None
    partners: int


class ScoreDifference(TypedDict, total=False):
    """Differences between another backend's scores and those of Transformers on a sample; empty if none was compared.

    Attributes:
        rows: int; sequences compared.
        tokens: int; tokens compared.
        mean: float, nats per token; mean absolute difference.
        p95: float, nats per token; its 95th percentile.
        max: float, nats per token; the largest one.
        bias: float, nats per token; mean of the signed difference, the backend's score minus that of Transformers.
    """

    rows: int
    tokens: int
    mean: float
    p95: float
    max: float
    bias: float


class ScorerFields(TypedDict, total=False):
    """Section `scorer`: the backend that computed the scores.

    Attributes:
        backend: str; transformers or vllm.
        versions: object, library -> version.
        attention: str; the one that scored, absent if vLLM did; not in the identity, as it changes only rounding.
        difference: `ScoreDifference`, absent if Transformers scored.
    """

    backend: str
    versions: dict[str, str]
    attention: str
    difference: ScoreDifference


class DataFile(TypedDict, total=False):
    """An entry of `data.files`.

    Attributes:
        name: str; the file's name without its folder.
        sha256: str; SHA-256 of its bytes, in hex.
        bytes: int, bytes; its size.
    """

    name: str
    sha256: str | None
    bytes: int | None


class DataFields(TypedDict, total=False):
    """Section `data`: the feedback that was read.

    Attributes:
        files: list of `DataFile`.
        read: int, rows.
        kept: int, rows; also the sum of the shards' rows.
        dropped: object, reason -> int, rows.
        desirable: int, rows kept with label true.
        undesirable: int, rows kept with label false.
        truncated: int; completions that were cut.
        kl_truncated: int; mismatched completions that were cut.
        prompts: int; distinct prompts.
        rows_hash: str; SHA-256 over the scored sequences, a part of the fingerprint.
        labels_hash: str; SHA-256 over order, labels, masses, pairs and source rows, no part of the fingerprint.
        places_hash: str; SHA-256 over the places of the rows, absent if the shards have no column `place`.
    """

    files: list[DataFile]
    read: int
    kept: int
    dropped: dict[str, int]
    desirable: int
    undesirable: int
    truncated: int
    kl_truncated: int
    prompts: int
    rows_hash: str
    labels_hash: str
    places_hash: str


class JudgementFields(TypedDict, total=False):
    """Section `judgements`: how feedback became masses; absent if every row is one bit of weight 1.

    Attributes:
        votes: str; share or count, absent without votes.
        rating_scale: list of two floats; the ratings that are wholly undesirable and wholly desirable, absent without one.
        weights: bool; true if rows were weighted, else absent.
        objectives: list of str; names of the objectives, absent without them.
    """

    votes: str
    rating_scale: list[float]
    weights: bool
    objectives: list[str]


class WorkerFields(TypedDict):
    """The workers of one kind that scored shards.

    Attributes:
        node: str; name of the machine.
        device: str; name of the GPU, or cpu.
        torch: str; its version.
        shards: int; shards scored there.
    """

    node: str
    device: str
    torch: str
    shards: int


class RunFields(TypedDict, total=False):
    """Section `run`: work done by the last run of kto-precompute.

    Attributes:
        scored_sequences: int; sequences that needed a forward pass.
        reused_sequences: int; sequences whose scores were reused from earlier shards.
        tokens: int, tokens in the scored sequences.
        seconds: float, seconds of scoring.
        tokens_per_second: float.
        workers: array of `WorkerFields`, absent if one process scored.
    """

    scored_sequences: int
    reused_sequences: int
    tokens: int
    seconds: float
    tokens_per_second: float
    workers: list[WorkerFields]


class ShardFields(TypedDict):
    """An entry of `shards`.

    Attributes:
        file: str; path inside the cache, `train/00000.parquet`.
        rows: int.
        bytes: int, bytes; the file's size.
        sha256: str; SHA-256 of the file, in hex.
    """

    file: str
    rows: int
    bytes: int
    sha256: str


class ScoringSections(TypedDict):
    """The sections that are known before scoring."""

    reference: ReferenceFields
    tokenizer: TokenizerFields
    tokenization: TokenizationFields
    scorer: ScorerFields


class Sections(ScoringSections):
    """All sections of a manifest except `shards`."""

    pairing: PairingFields
    data: DataFields
    run: RunFields


class OptionalEntries(TypedDict, total=False):
    """The entries of a manifest that only some caches have.

    Attributes:
        columns: list of str; the optional columns of the shards, absent without them.
        judgements: `JudgementFields`; absent without those columns.
    """

    columns: list[str]
    judgements: JudgementFields


class RowsIdentity(TypedDict):
    """The hashes that identify the rows of a cache.

    Attributes:
        fingerprint: str; of the cache.
        labels_hash: str | null; of section `data`.
    """

    fingerprint: str
    labels_hash: str | None


# In the order in which they are written.
SECTIONS = ("reference", "tokenizer", "tokenization", "pairing", "scorer", "data", "run")

# The fields that determine a score. Ids, paths, revisions and versions are left out: they name the same content.
IDENTITY_FIELDS = {
    "reference": ("weights_hash", "config_hash", "adapter_hash", "quantization", "dtype", "attention"),
    "tokenizer": ("files_hash", "chat_template_hash"),
    "tokenization": ("max_length", "rule", "chat"),
    "scorer": ("backend",),
}
# Those that are no part of the identity if absent: caches of before do not have them.
OPTIONAL_IDENTITY = frozenset({"tokenization.chat"})

# Characters. A longer name means damage, and would fill the terminal.
LONGEST_NAME = 500

Check: TypeAlias = Callable[[object], bool]


def is_count(value: object) -> bool:
    """Return whether a value is a whole number from 0 that fits 64 bits."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def is_text(value: object) -> bool:
    """Return whether a value is printable text of a name's length."""
    return isinstance(value, str) and value.isprintable() and len(value) <= LONGEST_NAME


def is_name(value: object) -> bool:
    """Return whether a value can name an objective: printable text of a name's length, with no space at its ends."""
    return is_text(value) and isinstance(value, str) and value.strip() == value != ""


def _is_positive(value: object) -> bool:
    return is_count(value) and value != 0


def _is_true(value: object) -> bool:
    return value is True


def _is_number(value: object) -> bool:
    return is_count(value) or (isinstance(value, float) and 0 <= value < float("inf"))


def _are_counts(value: object) -> bool:
    return isinstance(value, dict) and all(map(is_text, value)) and all(map(is_count, value.values()))


def _are_files(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(file, dict) and is_text(file.get("name")) for file in value)


def _is_template(value: object) -> bool:
    if isinstance(value, dict) and all(map(is_text, value)):
        return all(isinstance(one, str) for one in value.values())
    return isinstance(value, str)


def _are_switches(value: object) -> bool:
    return isinstance(value, dict) and all(isinstance(one, bool | int | float) for one in value.values())


def _are_columns(value: object) -> bool:
    return value in ([*MASS_COLUMNS], [*MASS_COLUMNS, OBJECTIVES])


def _is_scale(value: object) -> bool:
    numbers = isinstance(value, list) and len(value) == 2 and all(type(one) in (int, float) for one in value)
    return numbers and -math.inf < value[0] < value[1] < math.inf  # type: ignore[index]


def _are_names(value: object) -> bool:
    return isinstance(value, list) and 0 < len(value) == len(set(map(str, value))) and all(map(is_name, value))


def _or_absent(fits: Check) -> Check:
    return lambda value: value is None or fits(value)


# Checks of the values that are read or printed. The fingerprint does not protect them: whoever edits a manifest can
# recompute it.
CHECKS: Mapping[str, Mapping[str, Check]] = {
    "reference": {
        "id": is_text,
        **dict.fromkeys(("revision", "path", "adapter", "adapter_path"), _or_absent(is_text)),
        **dict.fromkeys(("weights_hash", "dtype", "attention"), _or_absent(is_text)),
        "vocabulary": _or_absent(_is_positive),
    },
    "tokenizer": {"chat_template": _or_absent(_is_template), "options": _or_absent(_are_switches)},
    "tokenization": {"max_length": _is_positive, "rendered_on": _or_absent(is_text), "chat": _or_absent(_is_true)},
    "pairing": {"partners": _is_positive, "method": _or_absent(is_text), "seed": _or_absent(is_count)},
    "scorer": dict.fromkeys(("backend", "attention"), _or_absent(is_text)),
    "data": {
        "files": _or_absent(_are_files),
        "dropped": _or_absent(_are_counts),
        **dict.fromkeys(("desirable", "undesirable"), is_count),
        **dict.fromkeys(("read", "truncated", "kl_truncated"), _or_absent(is_count)),
        **dict.fromkeys(("labels_hash", "places_hash"), _or_absent(is_text)),
    },
    "run": {
        **dict.fromkeys(("scored_sequences", "reused_sequences"), _or_absent(is_count)),
        "tokens_per_second": _or_absent(_is_number),
    },
}

# Of `OptionalEntries`; a field of the section may be absent.
COLUMN_CHECK: Check = _are_columns
JUDGEMENT_CHECKS: Mapping[str, Check] = {
    "votes": _or_absent(lambda value: value in ("share", "count")),
    "rating_scale": _or_absent(_is_scale),
    "weights": _or_absent(_is_true),
    "objectives": _or_absent(_are_names),
}

SHARD_CHECKS: Mapping[str, Check] = {"file": is_text, "rows": is_count, "bytes": is_count, "sha256": is_text}
