"""Recognise content that is a list of parts of text."""

from collections.abc import Mapping
from typing import Final, TypeGuard

from offline_kto.kto_core.feedback.message_keys import ROLE_KEYS
from offline_kto.kto_core.feedback.stored_values import opened

TEXT_PARTS: Final = frozenset({"text", "output_text", "input_text"})


def are_text_parts(value: object) -> TypeGuard[list[Mapping[str, str]]]:
    """Return whether a value is the content of one message as a list of parts that are text."""
    return isinstance(value, list | tuple) and len(value) > 0 and all(map(_is_text_part, value))


def text_in(value: object) -> object:
    """Return the text in a list of parts that are text, also as JSON text; any other value as it is."""
    found = opened(value)
    return "".join(part["text"] for part in found) if are_text_parts(found) else value


def _is_text_part(part: object) -> bool:
    if not isinstance(part, Mapping) or any(key in part for key in ROLE_KEYS):
        return False
    kind = part.get("type")
    return isinstance(kind, str) and kind in TEXT_PARTS and isinstance(part.get("text"), str)
