"""Read files of a model folder, with an error message for each way in which that can fail."""

import codecs
import json
from pathlib import Path

from offline_kto.kto_core.errors import ModelError, said_by


def read_json_object(path: Path) -> dict[str, object]:
    """Return the object in a JSON file.

    Raises:
        ModelError: not readable, not JSON, or not an object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path}: cannot be read as JSON ({said_by(error)}). Copy the model again.") from error
    if not isinstance(content, dict):
        raise ModelError(f"{path}: is not a JSON object. Copy the model again.")
    return content


_POINTER = b"version https://git-lfs.github.com/spec/"
_MARKS = (codecs.BOM_UTF8, codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
_READ = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*.tiktoken")


def check_texts(folder: Path) -> None:
    """Refuse git LFS pointers, and JSON files with a byte-order mark, which transformers cannot read.

    Raises:
        ModelError: there is one; the message names the remedy.
    """
    for path in sorted(file for pattern in _READ for file in folder.glob(pattern)):
        try:
            with path.open("rb") as file:
                start = file.read(len(_POINTER))
        except OSError as error:
            raise ModelError(f"{path}: cannot be read ({said_by(error)}). Check its owner and mode (ls -l).") from error
        if start == _POINTER:
            raise ModelError(
                f"{path}: a git LFS pointer, not the file itself. Run `git lfs pull` in {folder}, or download the model "
                "with: hf download"
            )
        if path.suffix == ".json" and start.startswith(_MARKS):
            raise ModelError(
                f"{path}: begins with a byte-order mark (BOM), which some editors write and transformers cannot read. "
                "Save it as UTF-8 without BOM."
            )
