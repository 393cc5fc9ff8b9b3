"""The manifest: what a cache is, what it was made from, and whether its files are still those.

`manifest.json` is written last; without it there is no cache.
"""

import datetime
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from kto_core.durable import write_text
from kto_core.errors import CacheError, NewerFormatError, printable
from kto_core.identity import file_hashes, json_hash

FORMAT = 1
MANIFEST = "manifest.json"

# What decides a reference number. Ids, paths, revisions and versions name things; these are the things.
_IDENTITY_FIELDS = {
    "reference": ("weights_hash", "config_hash", "adapter_hash", "quantization", "dtype", "attention"),
    "tokenizer": ("files_hash", "chat_template_hash"),
    "tokenization": ("max_length", "rule"),
    "scorer": ("backend",),
}

_HOW_TO_MAKE = "Make a reference cache with: kto-precompute --model MODEL --data FILE --out {}"
AGAIN = "Run the same kto-precompute again."

_SECTIONS = ("reference", "tokenizer", "tokenization", "pairing", "scorer", "data", "run")


@dataclass(frozen=True)
class Manifest:
    """The sections of `manifest.json`; see the README for the fields of each."""

    reference: dict[str, Any]
    tokenizer: dict[str, Any]
    tokenization: dict[str, Any]
    pairing: dict[str, Any]
    scorer: dict[str, Any]
    data: dict[str, Any]
    shards: list[dict[str, Any]]
    run: dict[str, Any]
    created: str
    fingerprint: str

    @property
    def rows(self) -> int:
        return sum(int(shard["rows"]) for shard in self.shards)

    @property
    def vocabulary(self) -> int | None:
        """Tokens that the reference knows; None where the manifest does not say."""
        size = self.reference.get("vocabulary")
        return size if isinstance(size, int) else None

    @property
    def identity(self) -> dict[str, Any]:
        return identity_of({name: getattr(self, name) for name in _IDENTITY_FIELDS})


def identity_of(sections: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The fields that decide a score, `section.field` -> value."""
    return {
        f"{section}.{field}": sections[section].get(field)
        for section, fields in _IDENTITY_FIELDS.items()
        for field in fields
    }


def differences(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """Lines like `tokenization.max_length: 1024 in the cache, 512 now`, for what differs."""
    lines = []
    for key in sorted({*found, *wanted}):
        if found.get(key) != wanted.get(key):
            lines.append(f"{key}: {_short(found.get(key))} in the cache, {_short(wanted.get(key))} now")
    return lines


def _short(value: Any) -> str:
    text = "none" if value is None else str(value)
    return text[:12] + "..." if len(text) > 40 else text


def fingerprint(identity: Mapping[str, Any], pairing: Mapping[str, Any], rows_hash: str) -> str:
    """Hash of all that can change a number in the cache, and of nothing else.

    Args:
        identity: from `identity_of`.
        pairing: method, seed, block, partners.
        rows_hash: hash over the sequences scored; labels and order are not in it.
    """
    return json_hash({"format": FORMAT, "identity": dict(identity), "pairing": dict(pairing), "rows": rows_hash})


def write_manifest(folder: Path, sections: Mapping[str, Any], shards: Sequence[Mapping[str, Any]], mark: str) -> None:
    """Declare the cache complete. Raises: CacheError: the disk does not take it."""
    content = {
        "format": FORMAT,
        "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "fingerprint": mark,
        **{name: sections[name] for name in _SECTIONS},
        "shards": list(shards),
    }
    path = folder / MANIFEST
    try:
        write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")
    except OSError as error:
        raise CacheError(
            f"{path}: cannot be written: {error}. Finished shards are kept; run again to go on."
        ) from error


def read_manifest(folder: Path) -> Manifest:
    """Read and check `manifest.json`.

    Raises:
        CacheError: no cache here, an unfinished one, a newer format, a damaged manifest, or a shard
            path that leaves the folder.
    """
    path = folder / MANIFEST
    if not folder.is_dir():
        raise CacheError(f"{folder}: no such folder. {_HOW_TO_MAKE.format(folder)}")
    if not path.exists():
        raise no_manifest(folder, unfinished=any((folder / "train").glob("*.parquet")))
    try:
        content = path.read_bytes()
    except OSError as error:
        raise CacheError(f"{path}: cannot be read ({error}). {AGAIN}") from error
    return parse_manifest(path, content)


def no_manifest(folder: Path | str, *, unfinished: bool) -> CacheError:
    """The error for a folder without `manifest.json`, which may hold shards already."""
    if unfinished:
        return CacheError(
            f"{folder}: an unfinished cache (shards, but no {MANIFEST}). {AGAIN} It goes on where it stopped."
        )
    return CacheError(f"{folder}: not a reference cache (no {MANIFEST}). {_HOW_TO_MAKE.format(folder)}")


def parse_manifest(path: Path | str, text: bytes) -> Manifest:
    """A manifest from its content.

    Args:
        path: named in errors.

    Raises:
        CacheError: as `read_manifest`.
    """
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CacheError(f"{path}: cannot be read ({error}). {AGAIN}") from error
    if not isinstance(content, dict) or not _is_whole(content.get("format")):
        raise CacheError(f"{path}: not the manifest of a reference cache.")
    if content["format"] != FORMAT:
        raise NewerFormatError(
            f"{path}: cache format {_short(content['format'])}; this version reads format {FORMAT}. "
            "Update offline-kto, or run kto-precompute again."
        )
    for found in _texts(content):
        if not found.isprintable():
            raise CacheError(f"{path}: holds control characters ({_short(printable(found))}); it is not read.")
    return _parse(path, content)


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _texts(value: Any) -> Iterator[str]:
    """All strings in a JSON value: what is printed later."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield key
            yield from _texts(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _texts(inner)


def _parse(path: Path | str, content: dict[str, Any]) -> Manifest:
    for section in _SECTIONS:
        if not isinstance(content.get(section), dict):
            raise CacheError(f"{path}: section {section!r} is missing or damaged. {AGAIN}")
    shards = content.get("shards")
    if not isinstance(shards, list) or not shards:
        raise CacheError(f"{path}: lists no shards. {AGAIN}")
    for shard in shards:
        wanted = {"file": str, "rows": int, "bytes": int, "sha256": str}
        if not isinstance(shard, dict) or any(not isinstance(shard.get(key), kind) for key, kind in wanted.items()):
            raise CacheError(f"{path}: a shard entry is damaged: {_short(shard)}. {AGAIN}")
        parts = PurePosixPath(shard["file"]).parts
        if PurePosixPath(shard["file"]).is_absolute() or ".." in parts or "\\" in shard["file"]:
            raise CacheError(f"{path}: shard {shard['file']!r} lies outside of the cache folder; it is not read.")
    if len({str(PurePosixPath(shard["file"])) for shard in shards}) != len(shards):
        raise CacheError(f"{path}: lists a shard twice.")
    for key in ("fingerprint", "created"):
        if not isinstance(content.get(key), str):
            raise CacheError(f"{path}: {key!r} is missing. {AGAIN}")
    manifest = Manifest(
        **{name: content[name] for name in _SECTIONS},
        shards=shards,
        created=content["created"],
        fingerprint=content["fingerprint"],
    )
    _check_edited(path, manifest)
    return manifest


def _check_edited(path: Path | str, manifest: Manifest) -> None:
    expected = fingerprint(manifest.identity, manifest.pairing, str(manifest.data.get("rows_hash")))
    if expected != manifest.fingerprint:
        raise CacheError(f"{path}: does not match its own fingerprint: it was edited or damaged. {AGAIN}")
    kept = manifest.data.get("kept")
    if manifest.rows != kept:
        raise CacheError(
            f"{path}: its shards hold {manifest.rows} rows, but {kept} were kept: a shard is missing. {AGAIN}"
        )


def check_places(folder: Path, manifest: Manifest) -> None:
    """Compare names and sizes of the shards with the manifest.

    Raises:
        CacheError: a shard that is missing, of another size, outside of the folder, or not in the manifest.
    """
    for shard in manifest.shards:
        path = folder / shard["file"]
        if not path.is_file():
            raise CacheError(f"{path}: missing. Run the same kto-precompute again; it scores only what is missing.")
        if path.resolve().parent != (folder / "train").resolve():
            raise CacheError(f"{path}: lies outside of the cache folder; it is not read.")
        size = path.stat().st_size
        if size != shard["bytes"]:
            raise CacheError(f"{path}: {size} bytes, the manifest says {shard['bytes']}. {AGAIN}")
    listed = {PurePosixPath(shard["file"]).name for shard in manifest.shards}
    strays = sorted(path.name for path in (folder / "train").glob("[!.]*.parquet") if path.name not in listed)
    if strays:
        raise CacheError(
            f"{folder / 'train' / strays[0]}: in the folder, but not in the manifest. Remove it, or run the same kto-precompute again."
        )


def check_files(folder: Path, manifest: Manifest) -> None:
    """Compare every shard with the manifest: there, as long, and with the same sha256.

    Raises:
        CacheError: naming the file and what is wrong with it.
    """
    check_places(folder, manifest)
    paths = [folder / shard["file"] for shard in manifest.shards]
    for path, shard, digest in zip(paths, manifest.shards, file_hashes(paths), strict=True):
        if digest != shard["sha256"]:
            raise CacheError(f"{path}: its content is not what was written (sha256 differs). {AGAIN}")
