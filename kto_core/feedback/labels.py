"""Convert label words and ratings to true and false."""

import math
import re
from collections.abc import Mapping
from typing import Final

from offline_kto.kto_core.errors import FeedbackError
from offline_kto.kto_core.feedback.formats import quoted

# The only words that are labels. Case and surrounding spaces do not matter.
LABEL_WORDS: Final[Mapping[str, bool]] = {
    "true": True,
    "false": False,
    "1": True,
    "0": False,
    "good": True,
    "bad": False,
    "desirable": True,
    "undesirable": False,
    "thumbs_up": True,
    "thumbs_down": False,
    "up": True,
    "down": False,
    "yes": True,
    "no": False,
    "chosen": True,
    "rejected": False,
    # Thumbs, alone and with the variation selectors for an emoji (FE0F) or a text (FE0E) glyph.
    "\U0001f44d": True,
    "\U0001f44d\ufe0f": True,
    "\U0001f44d\ufe0e": True,
    "\U0001f44e": False,
    "\U0001f44e\ufe0f": False,
    "\U0001f44e\ufe0e": False,
}
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)


def parse_label(value: object, where: str, field: str) -> bool:
    """Return the label in a bool, in 1 or 0, or in one of LABEL_WORDS.

    Raises:
        FeedbackError: any other value. A value is never a label because it is non-empty or non-zero.
    """
    if isinstance(value, bool):
        return value
    if isinstance(value, int | float) and value in (0, 1):
        return value == 1
    if isinstance(value, str) and value.strip().lower() in LABEL_WORDS:
        return LABEL_WORDS[value.strip().lower()]
    advice = "Thumbs data: write true for up, false for down."
    number = number_in(value)
    if number in (0, 1):  # text: pandas writes a column that has gaps as 1.0 and 0.0
        advice = f"Write {number:.0f}."
    elif number is not None:
        advice = f"If it is a rating, pass --label-field {field} --rating-threshold 4 (or median)."
    raise FeedbackError(f"{where}: '{field}' must be true or false, got {quoted(value)}. {advice}")


def number_in(value: object) -> float | None:
    """Return a finite float, or None. Text must be a decimal number: float() would also accept "nan" and "1_0"."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    if isinstance(value, str) and _NUMBER.fullmatch(value.strip()) is None:
        return None
    try:
        number = float(value)
    except OverflowError:  # an integer of more than 300 digits
        return None
    return number if math.isfinite(number) else None


# A class with a smaller share of the rows is nearly absent: 1 in 20 is far from the published 1:1 to 4:3.
_RARE = 0.05


def rare_class(desirable: int, undesirable: int) -> str | None:
    """Return a sentence about a class that is nearly absent; None if neither is, or if one is missing altogether."""
    rarer, total = min(desirable, undesirable), desirable + undesirable
    if not rarer or rarer >= _RARE * total:
        return None
    name = "desirable" if desirable < undesirable else "undesirable"
    return f"only {rarer:,} of {total:,} rows are {name} ({rarer / total:.1%})."
