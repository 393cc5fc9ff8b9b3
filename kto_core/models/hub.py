"""Download a model or adapter from the hub: only files that are loaded, with a time limit, or from the hub's cache."""

import re
import threading
import time
from pathlib import Path

from offline_kto.kto_core.console import tell, warn
from offline_kto.kto_core.errors import ModelError, said_by
from offline_kto.kto_core.hashing import weight_files
from offline_kto.kto_core.library_types import HubSession

# Files that loading a model and its tokenizer reads ("*" also matches "/", here and below).
WANTED = ["*.json", "*.safetensors", "*.model", "tokenizer.model.*", "*.txt", "*.tiktoken", "*.bpe", "*.jinja", "*.py"]
# Files that describe a model without its weights.
DESCRIBES = ["config.json", "*.py"]
# Duplicates of the same weights: other formats, other types, earlier checkpoints.
UNWANTED = [
    *(f"*/*{end}" for end in (".json", ".safetensors", ".model", ".txt", ".tiktoken", ".bpe")),
    "consolidated*",
    *(f"*.{variant}{end}" for variant in ("fp16", "bf16", "fp32") for end in (".safetensors", "-*.safetensors")),
]
_COMMIT = re.compile(r"[0-9a-f]{40}")
_SECONDS_IN_SILENCE = 3.0


def fetch_from_hub(name: str, *, revision: str | None, what: str, weights: bool = True) -> Path:
    """Return the folder of a hub repository in the hub's cache, downloading missing files.

    A commit that is complete in the cache needs no request. If the hub does not answer within a time limit
    (`HF_HUB_ETAG_TIMEOUT`, 10 seconds unless set), the cached copy of that revision is used.

    Args:
        what: "model" or "adapter", for messages.
        weights: whether to download weights and tokenizer too, or the configuration alone.

    Raises:
        ModelError: it cannot be downloaded.
    """
    import huggingface_hub
    from huggingface_hub.constants import HF_HUB_ETAG_TIMEOUT

    if revision is not None and _COMMIT.fullmatch(revision):
        cached = _cached(name, revision)
        if cached is not None:
            return cached
    limit = HF_HUB_ETAG_TIMEOUT
    bound_requests(huggingface_hub.get_session(), limit)
    started = time.monotonic()
    waiting = threading.Timer(_SECONDS_IN_SILENCE, _say_what_is_awaited, [name, limit])
    waiting.daemon = True
    waiting.start()
    try:
        folder = huggingface_hub.snapshot_download(
            name, revision=revision, allow_patterns=WANTED if weights else DESCRIBES, ignore_patterns=UNWANTED
        )
    except Exception as error:  # from the hub, its HTTP client or the disk
        raise ModelError(
            f"{name}: no such {what} folder here, and it cannot be fetched from the hub: {said_by(error)}"
        ) from error
    finally:
        waiting.cancel()
    path = Path(folder)
    if time.monotonic() - started > limit and not _is_fresh(path, started):
        warn(f"{name}: the hub did not answer; its cached copy is used (commit {path.name})")
    return path


def bound_requests(session: HubSession, seconds: float) -> None:
    """Give a time limit to each request without one: requests for a repository's state have none.

    Args:
        session: the HTTP client of `huggingface_hub`; it keeps the limit for the life of the process.
    """

    def bound(request: HubSession) -> None:
        limits = request.extensions.get("timeout") or {}
        request.extensions["timeout"] = {
            kind: limits.get(kind) or seconds for kind in ("connect", "read", "write", "pool")
        }

    hooks = session.event_hooks
    session.event_hooks = {**hooks, "request": [*hooks["request"], bound]}


def _cached(name: str, commit: str) -> Path | None:
    """Return the snapshot of a commit if the cache has all of it."""
    import huggingface_hub

    try:
        folder = Path(
            huggingface_hub.snapshot_download(
                name, revision=commit, allow_patterns=WANTED, ignore_patterns=UNWANTED, local_files_only=True
            )
        )
        files = weight_files(folder)
    except Exception:  # noqa: BLE001  (missing or incomplete: it is downloaded)
        return None
    settings = any((folder / one).exists() for one in ("config.json", "adapter_config.json"))
    return folder if settings and files and all(file.exists() for file in files) else None


def _say_what_is_awaited(name: str, limit: float) -> None:
    tell(f"hub         waiting for the hub: {name} (at most {limit:g} s without an answer)")


def _is_fresh(folder: Path, started: float) -> bool:
    """Return whether something in the folder was downloaded since `started` (a value of `time.monotonic`)."""
    since = time.time() - (time.monotonic() - started)
    return any(file.lstat().st_mtime >= since for file in folder.rglob("*"))
