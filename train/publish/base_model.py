"""Name the model that a run started from as others know it, and find its licence."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from huggingface_hub import ModelCard, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # exported when it is used

from offline_kto.kto_core.errors import printable
from offline_kto.kto_core.foreign_files import MEGABYTE, read_foreign
from offline_kto.train.publish.local_paths import last_name

if TYPE_CHECKING:
    from offline_kto.train.model.policy import PolicyFiles

CARD = "README.md"

_LICENSE = re.compile(r"[a-z0-9][a-z0-9.+-]{0,60}")
_LINK = re.compile(r"https://[\w.-]+/[\w./%~-]*")


@dataclass(frozen=True)
class License:
    """The licence that a model card states.

    Attributes:
        license: its identifier on the hub, such as apache-2.0; "other" for one that has only a name.
        license_name: of another licence, or None.
        license_link: its web address, or None.
    """

    license: str
    license_name: str | None = None
    license_link: str | None = None


@dataclass(frozen=True)
class BaseModel:
    """The model that a run started from.

    Attributes:
        name: its hub id, or the name of its folder.
        on_hub: whether the name is a hub id.
        license: None if it is not known.
    """

    name: str
    on_hub: bool
    license: License | None

    @classmethod
    def of(cls, files: "PolicyFiles") -> "BaseModel":
        """Return the base model of a run."""
        on_hub = not files.is_local and is_repository_name(files.name)
        name = files.name if on_hub else printable(last_name(files.name), 200)
        return cls(name, on_hub, _license_of(files, on_hub=on_hub))


def is_repository_name(name: str) -> bool:
    """Return whether a name can be that of a repository on the hub."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def _license_of(files: "PolicyFiles", *, on_hub: bool) -> License | None:
    places = [files.folder / CARD]
    if on_hub:
        cached = try_to_load_from_cache(files.name, CARD)
        places += [Path(cached)] if isinstance(cached, str) else []
    return next((found for found in map(_stated_license, places) if found is not None), None)


def _stated_license(card: Path) -> License | None:
    """Return the licence in a card's front matter; None without one that the hub would accept."""
    try:
        text = read_foreign(card, most=MEGABYTE).decode("utf-8-sig")
        data = ModelCard(text, ignore_metadata_errors=True).data.to_dict()
    except Exception:  # noqa: BLE001 - another's file: whatever is wrong with it, it states no licence
        return None
    stated, name, link = (data.get(key) for key in ("license", "license_name", "license_link"))
    if not isinstance(stated, str) or not _LICENSE.fullmatch(stated):
        return None
    named = isinstance(name, str) and _LICENSE.fullmatch(name)
    linked = isinstance(link, str) and _LINK.fullmatch(link)
    return License(stated, name if named else None, link if linked else None)
