"""Read, write and check `manifest.json`, which describes a cache: its reference, its data and its files.

`manifest.json` is written last. A folder without it is not a complete cache.
"""

import contextlib
import datetime
import errno
import json
import os
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import cast

from offline_kto.kto_core.cache.manifest_fields import (
    CHECKS,
    COLUMN_CHECK,
    IDENTITY_FIELDS,
    JUDGEMENT_CHECKS,
    OPTIONAL_IDENTITY,
    SECTIONS,
    SHARD_CHECKS,
    DataFields,
    Identity,
    JudgementFields,
    OptionalEntries,
    PairingFields,
    ReferenceFields,
    RowsIdentity,
    RunFields,
    ScorerFields,
    ScoringSections,
    Sections,
    ShardFields,
    TokenizationFields,
    TokenizerFields,
    is_count,
    is_text,
)
from offline_kto.kto_core.cache.shards import WRITE_AGAIN
from offline_kto.kto_core.durable_files import write_json
from offline_kto.kto_core.errors import CacheError, NewerFormatError, printable, said_by
from offline_kto.kto_core.foreign_files import MEGABYTE, read_foreign
from offline_kto.kto_core.hashing import json_hash
from offline_kto.kto_core.judgements import OBJECTIVES

FORMAT = 1
# Characters; about 300,000 shards.
MANIFEST = "manifest.json"

# Why rows were left out, among the reasons in `data.dropped`.
PROMPT_TOO_LONG = "prompt_too_long"

# Shards at most.
_LARGEST = 64 * MEGABYTE

AGAIN = "Run the same kto-precompute again."

# A disk that fails, and network mounts that forgot a file or do not answer.
_OF_DISKS = {errno.EIO, errno.ESTALE, errno.ENODEV, errno.ENOTCONN, errno.ETIMEDOUT}

_LONGEST_FILE_NAME = 200


@dataclass(frozen=True, repr=False)
class Manifest:
    """The sections of `manifest.json`; `manifest_fields` and docs/cache-format.md have the fields of each.

    Attributes:
        columns: the optional columns of the shards with masses; empty if every row is one bit of weight 1.
        judgements: how feedback became masses; empty without those columns.
        intact: whether the checksum matches the content; `verify_cache` refuses the cache if not, once it has looked
            for a more specific error.
    """

    reference: ReferenceFields
    tokenizer: TokenizerFields
    tokenization: TokenizationFields
    pairing: PairingFields
    scorer: ScorerFields
    data: DataFields
    shards: list[ShardFields]
    run: RunFields
    created: str
    fingerprint: str
    intact: bool
    columns: list[str] = field(default_factory=list)
    judgements: JudgementFields = field(default_factory=lambda: JudgementFields())

    def __repr__(self) -> str:
        reference = printable(str(self.reference.get("id")), _LONGEST_FILE_NAME)
        return f"Manifest(reference {reference!r}, {self.rows:,} rows, fingerprint {self.fingerprint[:12]})"

    @property
    def rows(self) -> int:
        return sum(shard["rows"] for shard in self.shards)

    @property
    def vocabulary(self) -> int | None:
        """Vocabulary size of the reference; None if the manifest does not have it."""
        return self.reference.get("vocabulary")

    @property
    def objectives(self) -> list[str]:
        """Names of the objectives that were judged; empty without objectives."""
        return self.judgements.get("objectives", [])

    @property
    def partners(self) -> int:
        """Mismatched completions of each row."""
        return self.pairing["partners"]

    @property
    def has_places(self) -> bool:
        """Return whether the shards say where their rows are in the feedback."""
        return self.data.get("places_hash") is not None

    @property
    def rows_identity(self) -> RowsIdentity:
        """Fingerprint and labels hash, which identify the rows; the fingerprint does not cover labels and order."""
        return {"fingerprint": self.fingerprint, "labels_hash": self.data.get("labels_hash")}

    @property
    def identity(self) -> Identity:
        return identity_of(
            {
                "reference": self.reference,
                "tokenizer": self.tokenizer,
                "tokenization": self.tokenization,
                "scorer": self.scorer,
            }
        )


def identity_of(sections: ScoringSections) -> Identity:
    """Return the fields that determine a score, `section.field` -> value."""
    named = cast("Mapping[str, Mapping[str, object]]", sections)
    return {
        f"{section}.{field}": named[section].get(field)
        for section, fields in IDENTITY_FIELDS.items()
        for field in fields
        if f"{section}.{field}" not in OPTIONAL_IDENTITY or named[section].get(field) is not None
    }


def differences(found: Mapping[str, object], wanted: Mapping[str, object]) -> list[str]:
    """Return a line for each differing field, like `tokenization.max_length: 1024 in the cache, 512 now`."""
    lines = []
    for key in sorted({*found, *wanted}):
        if found.get(key) != wanted.get(key):
            old, new = (_CHAT[one.get(key) is True] if key == CHAT else _short(one.get(key)) for one in (found, wanted))
            lines.append(f"{key}: {old} in the cache, {new} now")
    return lines


# What the field says, and the option that chooses it.
CHAT = "tokenization.chat"
_CHAT = {False: "plain text as it is (--chat never)", True: "plain text as conversations (--chat auto)"}


def _short(value: object) -> str:
    try:
        text = "none" if value is None else str(value)
    except ValueError:  # a whole number of thousands of digits
        return "a huge number"
    return printable(text[:12] + "..." if len(text) > 40 else text)


def fingerprint(identity: Identity, pairing: PairingFields, rows_hash: str) -> str:
    """Return a hash of everything that can change a number in the cache, and of nothing else.

    Args:
        identity: from `identity_of`.
        pairing: method, seed, block, partners.
        rows_hash: hash over the sequences scored; labels and order are not in it.
    """
    return json_hash({"format": FORMAT, "identity": dict(identity), "pairing": dict(pairing), "rows": rows_hash})


def checksum(content: Mapping[str, object]) -> str:
    """Return a hash of the manifest's content without `checksum`, which detects any change of it."""
    return json_hash(json.loads(json.dumps({name: value for name, value in content.items() if name != "checksum"})))


def write_manifest(
    folder: Path,
    sections: Sections,
    shards: Sequence[ShardFields],
    mark: str,
    *,
    optional: OptionalEntries | None = None,
) -> None:
    """Write the manifest, which marks the cache as complete.

    Args:
        optional: the entries that only some caches have.

    Raises:
        CacheError: it cannot be written.
    """
    named = cast("Mapping[str, object]", sections)
    content: dict[str, object] = {
        "format": FORMAT,
        "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "fingerprint": mark,
        **{name: named[name] for name in SECTIONS},
        **(optional or {}),
        "shards": list(shards),
    }
    content["checksum"] = checksum(content)
    path = folder / MANIFEST
    try:
        write_json(path, content)
    except OSError as error:
        raise CacheError(f"{path}: cannot be written: {error}. {WRITE_AGAIN}") from error


def read_manifest(folder: Path) -> Manifest:
    """Read and check `manifest.json`.

    Raises:
        CacheError: no cache here, an unfinished one, a newer format, a damaged manifest, or a shard
            path that leaves the folder.
    """
    path = folder / MANIFEST
    with readable(path):
        if folder.is_file():
            raise CacheError(f"{folder}: a file; pass the cache's folder, which contains {MANIFEST} and train/.")
        if not folder.is_dir():
            raise CacheError(f"{folder}: no such folder. {_how_to_make(folder)}")
        if not path.exists():
            raise no_manifest(folder, unfinished=any((folder / "train").glob("*.parquet")))
        if not path.is_file():
            raise CacheError(f"{path}: not a regular file. Remove it. {AGAIN}")
        return parse_manifest(path, read_foreign(path, most=_LARGEST))


@contextlib.contextmanager
def readable(path: Path) -> Iterator[None]:
    """Re-raise operating system errors of reading a cache as a `CacheError` that names the file and the remedy."""
    try:
        yield
    except MemoryError as error:
        raise CacheError(f"{path}: needs more memory than is available ({said_by(error)}).") from error
    except OSError as error:
        where = os.fsdecode(error.filename) if error.filename is not None else path
        advice = " Check its owner and mode (ls -l)." if isinstance(error, PermissionError) else ""
        if error.errno in _OF_DISKS:
            advice = " Check the disk or mount that it is on; then start again."
        raise CacheError(f"{where}: cannot be read ({said_by(error)}).{advice}") from error


def no_manifest(folder: Path | str, *, unfinished: bool) -> CacheError:
    """Return the error for a folder without `manifest.json`, which may already contain shards."""
    if unfinished:
        return CacheError(
            f"{folder}: an unfinished cache (shards, but no {MANIFEST}). {AGAIN} It continues where it stopped."
        )
    return CacheError(f"{folder}: not a reference cache (no {MANIFEST}). {_how_to_make(folder)}")


def _how_to_make(folder: Path | str) -> str:
    return f"Make one with: kto-precompute --model MODEL --data FILE --out {shlex.quote(str(folder))}"


def parse_manifest(path: Path | str, text: bytes) -> Manifest:
    """Parse and check the content of a manifest.

    Args:
        path: named in errors.

    Raises:
        CacheError: as `read_manifest`.
    """
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CacheError(f"{path}: cannot be read ({said_by(error)}). {AGAIN}") from error
    if not isinstance(content, dict) or not is_count(content.get("format")):
        raise CacheError(f"{path}: not the manifest of a reference cache.")
    if content["format"] > FORMAT:
        raise NewerFormatError(
            f"{path}: cache format {_short(content['format'])}; this version reads format {FORMAT}. "
            "Update offline-kto, or score again: into another folder, or into this one with --overwrite."
        )
    if content["format"] != FORMAT:
        raise CacheError(f"{path}: cache format {content['format']}; this version reads format {FORMAT}. {AGAIN}")
    return _parse(path, content)


def _parse(path: Path | str, content: Mapping[str, object]) -> Manifest:
    known = {"format", "created", "fingerprint", "shards", "checksum", *SECTIONS, *OptionalEntries.__annotations__}
    unknown = sorted(content.keys() - known)
    if unknown:
        raise CacheError(f"{path}: has an entry {_short(unknown[0])!r}, which format {FORMAT} does not define. {AGAIN}")
    for section in SECTIONS:
        if not isinstance(content.get(section), dict):
            raise CacheError(f"{path}: section {section!r} is missing or damaged. {AGAIN}")
    shards = content.get("shards")
    if not isinstance(shards, list) or not shards:
        raise CacheError(f"{path}: lists no shards. {AGAIN}")
    for shard in shards:
        if not isinstance(shard, dict) or not all(fits(shard.get(key)) for key, fits in SHARD_CHECKS.items()):
            raise CacheError(f"{path}: a shard entry is damaged: {_short(shard)}. {AGAIN}")
        place = PurePosixPath(shard["file"])
        if place.is_absolute() or ".." in place.parts or "\\" in shard["file"]:
            raise CacheError(f"{path}: shard {shard['file'][:100]!r} is outside the cache folder; it is not read.")
        if len(place.name) > _LONGEST_FILE_NAME:
            raise CacheError(f"{path}: a shard entry is damaged: {_short(shard)}. {AGAIN}")
    if len({str(PurePosixPath(shard["file"])) for shard in shards}) != len(shards):
        raise CacheError(f"{path}: lists a shard twice.")
    for key in ("fingerprint", "created"):
        if not is_text(content.get(key)):
            raise CacheError(f"{path}: {key!r} is missing. {AGAIN}")
    sections = cast("Sections", {name: content[name] for name in SECTIONS})
    manifest = Manifest(
        **sections,
        shards=shards,
        created=str(content["created"]),
        fingerprint=str(content["fingerprint"]),
        intact=content.get("checksum") == checksum(content),
        **_optional_entries(path, content),
    )
    _check_edited(path, manifest)
    _check_fields(path, cast("Mapping[str, Mapping[str, object]]", sections))
    return manifest


def _optional_entries(path: Path | str, content: Mapping[str, object]) -> OptionalEntries:
    columns, judgements = content.get("columns"), content.get("judgements")
    if columns is None and judgements is None:
        return {}
    if not COLUMN_CHECK(columns):
        raise CacheError(f"{path}: columns is {_short(columns)}: damaged. {AGAIN}")
    if not isinstance(judgements, dict):
        raise CacheError(f"{path}: section 'judgements' is missing or damaged. {AGAIN}")
    for name, fits in JUDGEMENT_CHECKS.items():
        if not fits(judgements.get(name)):
            raise CacheError(f"{path}: judgements.{name} is {_short(judgements.get(name))}: damaged. {AGAIN}")
    if (OBJECTIVES in cast("list[str]", columns)) != ("objectives" in judgements):
        raise CacheError(f"{path}: columns and judgements.objectives do not agree. {AGAIN}")
    return cast("OptionalEntries", {"columns": columns, "judgements": judgements})


def _check_fields(path: Path | str, sections: Mapping[str, Mapping[str, object]]) -> None:
    for section, checks in CHECKS.items():
        for name, fits in checks.items():
            value = sections[section].get(name)
            if not fits(value):
                raise CacheError(f"{path}: {section}.{name} is {_short(value)}: damaged. {AGAIN}")


def _check_edited(path: Path | str, manifest: Manifest) -> None:
    expected = fingerprint(manifest.identity, manifest.pairing, str(manifest.data.get("rows_hash")))
    if expected != manifest.fingerprint:
        raise CacheError(f"{path}: does not match its own fingerprint: it was edited or damaged. {AGAIN}")
    kept = manifest.data.get("kept")
    if manifest.rows != kept:
        raise CacheError(
            f"{path}: its shards contain {manifest.rows} rows, but {_short(kept)} were kept: a shard is missing. {AGAIN}"
        )


def check_places(folder: Path, manifest: Manifest) -> None:
    """Compare names and sizes of the shards with the manifest.

    Raises:
        CacheError: a shard that is missing, of another size, outside of the folder, or not in the manifest.
    """
    for shard in manifest.shards:
        path = folder / shard["file"]
        if not path.exists():
            raise CacheError(f"{path}: missing. Run the same kto-precompute again; it scores only missing rows.")
        if not path.is_file():
            raise CacheError(f"{path}: not a regular file. Remove it. {AGAIN}")
        if path.resolve().parent != folder.resolve() / "train":
            raise CacheError(f"{path}: is outside the cache folder; it is not read.")
        size = path.stat().st_size
        if size != shard["bytes"]:
            raise CacheError(f"{path}: {size} bytes, the manifest says {shard['bytes']}. {AGAIN}")
    listed = {PurePosixPath(shard["file"]).name for shard in manifest.shards}
    strays = sorted(path.name for path in (folder / "train").glob("[!.]*.parquet") if path.name not in listed)
    if strays:
        raise CacheError(
            f"{folder / 'train' / strays[0]}: in the folder, but not in the manifest. Remove it, or run the same kto-precompute again."
        )
