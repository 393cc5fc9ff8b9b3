"""Find the local folder of a model or adapter: given, or fetched from the hub."""

import re
from pathlib import Path

from offline_kto.kto_core.cache.manifest_fields import LONGEST_NAME, ReferenceFields
from offline_kto.kto_core.errors import ModelError, printable, said_by
from offline_kto.kto_core.foreign_files import check_kinds
from offline_kto.kto_core.models.hub import fetch_from_hub


def find_folder(
    model: str, *, revision: str | None, what: str = "model", local: bool = True
) -> tuple[Path, str | None]:
    """The local folder of a model or adapter, and the commit it was resolved to.

    A hub id is downloaded, or found in the hub's cache on disk. With `local` off a folder of that name is passed over.

    Raises:
        ModelError: neither a folder nor a hub id that can be had.
    """
    folder = Path(model).expanduser()
    try:
        if local and folder.is_dir():
            return _without_pipes(folder, what), None
        is_file = local and folder.exists()
    except (OSError, ValueError) as error:  # too long a name, or one with a null character
        raise ModelError(f"{printable(model, 100)}: no such {what} folder ({said_by(error)}).") from error
    if is_file:
        raise ModelError(f"{model}: a file; expected the {what}'s folder (with its config and *.safetensors).")
    _refuse_address(model)
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", model) or model.startswith("."):
        raise ModelError(f"{model}: no such {what} folder.")
    path = fetch_from_hub(model, revision=revision, what=what)
    return path, path.name


_HUB_URL = re.compile(r"(?:https?://)?(?:www\.)?(?:huggingface\.co|hf\.co)/([\w.-]+/[\w.-]+?)(?:\.git)?(?:/(.*))?/?")


def _refuse_address(model: str) -> None:
    """Say what to pass for the address of a hub page, or for `id@revision`.

    Raises:
        ModelError: it is one.
    """
    url, at = _HUB_URL.fullmatch(model), re.fullmatch(r"([\w.-]+/[\w.-]+)@([\w./-]+)", model)
    if url:
        kind, _, rest = (url[2] or "").partition("/")
        name, revision = url[1], rest.split("/")[0] if kind in ("tree", "blob", "resolve", "commit") else ""
    elif at:
        name, revision = at[1], at[2]
    elif "://" in model:
        raise ModelError(f"{printable(model, 100)}: an address. Pass a local folder, or a hub id (org/name).")
    else:
        return
    rest = f" with --revision {revision} (an option of kto-precompute)" if revision else ""
    raise ModelError(f"{printable(model, 100)}: neither a folder nor a hub id. Pass {name}{rest}.")


def _without_pipes(folder: Path, what: str) -> Path:
    """A folder in which no library waits for ever. Raises: ModelError: a pipe or a device is in it."""
    try:
        check_kinds(folder)
    except OSError as error:
        raise ModelError(f"{folder}: the {what} cannot be read: {said_by(error)}.") from error
    return folder


def find_reference(reference: ReferenceFields, what: str = "model") -> tuple[Path, str | None]:
    """The folder of the model, or of the adapter, that a manifest names, and its commit if it is the hub's.

    What was a folder when it was scored is never looked for on the hub, and what was the hub's is never taken from a
    folder that happens to have its name.

    Args:
        reference: the manifest's section.
        what: "model" or "adapter".

    Raises:
        ModelError: it is not there any more, or cannot be had.
    """
    if what == "model":
        name, path, revision = reference.get("id"), reference.get("path"), reference.get("revision")
    else:
        name, path, revision = reference.get("adapter"), reference.get("adapter_path"), None
    is_recorded = "path" in reference  # older caches do not say it; there a model with a commit was the hub's
    if path is None and (is_recorded or what == "adapter" or revision is not None):
        return find_folder(str(name), revision=revision, what=what, local=not is_recorded)
    for place in (path, name):  # the second where model and cache were moved together
        if place is not None and Path(str(place)).expanduser().is_dir():
            return _without_pipes(Path(str(place)).expanduser().absolute(), what), None
    shown = f"{path} (given as {name})" if path not in (None, name) else str(name)
    raise ModelError(f"{shown}: no such {what} folder; it was one when the cache was scored.")


def local_path(folder: Path, revision: str | None) -> str | None:
    """Where a model or adapter lies, for the manifest; None for one of the hub, which has a commit."""
    path = str(folder.absolute())
    return path if revision is None and path.isprintable() and len(path) <= LONGEST_NAME else None
