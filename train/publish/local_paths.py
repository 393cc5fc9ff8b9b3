"""Shorten local paths in what others will see: of each path only the last name remains."""

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

from offline_kto.kto_core.cache.manifest_fields import ReferenceFields
from offline_kto.kto_core.locations import is_url
from offline_kto.kto_core.options import as_plain
from offline_kto.kto_core.redaction import hidden
from offline_kto.train.config import TrainConfig

if TYPE_CHECKING:
    from offline_kto.train.model.policy import PolicyFiles

# An absolute path of at least two names, or one in a home folder; no part of a URL or of "chosen/rejected".
_ABSOLUTE = re.compile(r"(?<![\w.:/~<-])~?/(?:[^\s/'\"`<>|,;:()]+/)+([^\s/'\"`<>|,;:()]*)")
_OPTIONS = ("cache", "eval_cache", "out", "model")


def last_name(path: object) -> str:
    """Return the last name of a path or URL."""
    return PurePath(str(path).rstrip("/")).name or "model"


@dataclass(frozen=True)
class LocalPaths:
    """The paths that a run was given or has found, the longest first."""

    known: tuple[str, ...]

    @classmethod
    def of(cls, config: TrainConfig, out: Path, files: "PolicyFiles", reference: ReferenceFields) -> "LocalPaths":
        """Collect the paths of a run. Names of hub models are not paths."""
        names = [as_plain(config)[name] for name in _OPTIONS]
        if not files.is_local:
            names = [name for name in names if name != files.name]
        found = [*names, out, files.adapter, files.folder, reference.get("path"), reference.get("adapter_path")]
        if reference.get("path") is not None:
            found.append(reference.get("id"))
        if reference.get("adapter_path") is not None:
            found.append(reference.get("adapter"))
        return cls(tuple(sorted(_spellings(found), key=len, reverse=True)))

    def shorten(self, text: str) -> str:
        """Return a text in which each path is its last name."""
        for path in self.known:
            text = text.replace(path, last_name(path))
        return _ABSOLUTE.sub(lambda it: it[1] or last_name(it[0]), text)

    def shorten_all(self, value: Any) -> Any:
        """Return a value of JSON with the paths in all its texts shortened."""
        if isinstance(value, str):
            return self.shorten(value)
        if isinstance(value, dict):
            return {key: self.shorten_all(item) for key, item in value.items()}
        return [self.shorten_all(item) for item in value] if isinstance(value, list) else value


def _spellings(paths: Iterable[object]) -> set[str]:
    """Return paths as they were given and as they are found in files: absolute, and with links resolved."""
    found: set[str] = set()
    for path in paths:
        text = "" if path is None else str(path)
        if not text or text == ".":
            continue
        found |= {text, hidden(text)} if is_url(text) else {text, os.path.abspath(text), os.path.realpath(text)}
    return {path for path in found if "/" in path.rstrip("/")}
