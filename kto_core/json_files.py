"""JSON files of a model folder, read with one message for each way in which they cannot be."""

import json
from pathlib import Path
from typing import Any

from kto_core.errors import ModelError, said_by


def read_json_object(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file.

    Raises:
        ModelError: not readable, not JSON, or no object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path}: cannot be read as JSON ({said_by(error)}). Copy the model again.") from error
    if not isinstance(content, dict):
        raise ModelError(f"{path}: holds no JSON object. Copy the model again.")
    return content
