"""Find the local folder of a model or adapter: a given folder, or a download from the hub."""

import re
from pathlib import Path

from offline_kto.kto_core.cache.manifest_fields import LONGEST_NAME, ReferenceFields
from offline_kto.kto_core.errors import ModelError, printable, said_by
from offline_kto.kto_core.foreign_files import check_kinds
from offline_kto.kto_core.models.hub import fetch_from_hub


def find_folder(
    model: str, *, revision: str | None, what: str = "model", local: bool = True, weights: bool = True
) -> tuple[Path, str | None]:
    """Return the local folder of a model or adapter, and the commit it was resolved to.

    A hub id is downloaded, or found in the hub's cache on disk. With `local` off, a local folder of that name is
    ignored. With `weights` off, only the configuration is downloaded.

    Raises:
        ModelError: neither a folder nor a hub id that can be downloaded.
    """
    folder = Path(model).expanduser()
    try:
        if local and folder.is_dir():
            return _without_pipes(folder, what), None
        is_file = local and folder.exists()
    except (OSError, ValueError) as error:  # the name is too long or has a null character
        raise ModelError(f"{printable(model, 100)}: no such {what} folder ({said_by(error)}).") from error
    if is_file:
        raise ModelError(f"{model}: a file; expected the {what}'s folder (with its config and *.safetensors).")
    _refuse_address(model)
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", model) or model.startswith("."):
        raise ModelError(f"{model}: no such {what} folder.")
    path = fetch_from_hub(model, revision=revision, what=what, weights=weights)
    return path, path.name


_HUB_URL = re.compile(r"(?:https?://)?(?:www\.)?(?:huggingface\.co|hf\.co)/([\w.-]+/[\w.-]+?)(?:\.git)?(?:/(.*))?/?")


def _refuse_address(model: str) -> None:
    """Refuse the address of a hub page, and `id@revision`, and say what to pass instead.

    Raises:
        ModelError: `model` is one of these.
    """
    url, at = _HUB_URL.fullmatch(model), re.fullmatch(r"([\w.-]+/[\w.-]+)@([\w./-]+)", model)
    if url:
        kind, _, rest = (url[2] or "").partition("/")
        name, revision = url[1], rest.split("/")[0] if kind in ("tree", "blob", "resolve", "commit") else ""
    elif at:
        name, revision = at[1], at[2]
    elif "://" in model:
        raise ModelError(f"{printable(model, 100)}: a web address. Pass a local folder, or a hub id (org/name).")
    else:
        return
    rest = f" with --revision {revision} (an option of kto-precompute)" if revision else ""
    raise ModelError(f"{printable(model, 100)}: neither a folder nor a hub id. Pass {name}{rest}.")


def _without_pipes(folder: Path, what: str) -> Path:
    """Return a folder that libraries can read without blocking. Raises: ModelError: it contains a pipe or a device."""
    try:
        check_kinds(folder)
    except OSError as error:
        raise ModelError(f"{folder}: the {what} cannot be read: {said_by(error)}.") from error
    return folder


def find_reference(reference: ReferenceFields, what: str = "model") -> tuple[Path, str | None]:
    """Return the folder of the model or adapter that a manifest names, and its commit if it comes from the hub.

    A reference that was a folder when it was scored is never looked up on the hub. A reference from the hub is never
    read from a local folder that happens to have its name.

    Args:
        reference: the manifest's section.
        what: "model" or "adapter".

    Raises:
        ModelError: it no longer exists, or cannot be downloaded.
    """
    if what == "model":
        name, path, revision = reference.get("id"), reference.get("path"), reference.get("revision")
    else:
        name, path, revision = reference.get("adapter"), reference.get("adapter_path"), None
    is_recorded = "path" in reference  # older caches lack it; in these, a model with a commit came from the hub
    if path is None and (is_recorded or what == "adapter" or revision is not None):
        return find_folder(str(name), revision=revision, what=what, local=not is_recorded)
    for place in (path, name):  # the second if model and cache were moved together
        if place is not None and Path(str(place)).expanduser().is_dir():
            return _without_pipes(Path(str(place)).expanduser().absolute(), what), None
    shown = f"{path} (given as {name})" if path not in (None, name) else str(name)
    raise ModelError(f"{shown}: no such {what} folder; it was one when the cache was scored.")


def local_path(folder: Path, revision: str | None) -> str | None:
    """Return the path of a model or adapter for the manifest; None for a hub model, which has a commit."""
    path = str(folder.absolute())
    return path if revision is None and path.isprintable() and len(path) <= LONGEST_NAME else None
