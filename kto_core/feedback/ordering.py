"""Put values in order: numbers as numbers, also those written as text; times as times; any other text as text."""

import datetime
import json
import re
import warnings
from collections.abc import Sequence
from typing import Any, Final

from dateutil import parser

from offline_kto.kto_core.feedback.labels import number_in
from offline_kto.kto_core.feedback.quoting import quoted

_ISO: Final = "Write times as 2026-01-31T09:00:00, or as numbers"
_DIGITS = re.compile(r"\d+")
_PARTS_OF_A_TIME = re.compile(r"\d\D+\d")
_CLOCK = re.compile(r"\d:\d\d")
# What JavaScript writes around the offset of a zone: "GMT+0100 (CET)".
_ZONE = re.compile(r"(?:GMT|UTC)(?=[+-]\d)|\s*\([^)]*\)\s*\Z")
_YEAR_FIRST = re.compile(r"\d{4}\D")
# Dates that complete a text without a year, a month or a day; the text has all of them if it does not matter which is used.
_DEFAULTS = (datetime.datetime(2000, 1, 1), datetime.datetime(2001, 2, 2))


def in_order(values: Sequence[object]) -> list[Any]:
    """Return keys that order the values.

    Raises:
        ValueError: values of different kinds, as numbers beside text; times whose order is not clear.
    """
    if len(values) < 2:
        return [0] * len(values)
    found = [_inside(one) for one in values]
    numbers = [number_in(one) for one in found]
    if None not in numbers:
        return numbers
    texts = [one for one in found if isinstance(one, str)]
    if len(texts) < len(found) or any(one is not None for one in numbers):
        raise _mixed(found, [one is not None for one in numbers], "numbers")
    if not any(map(_DIGITS.search, texts)):
        return texts
    readings = [_times(text) for text in texts]
    if all(readings):
        return _one_order(texts, readings)
    if any(readings):
        raise _mixed(found, [bool(one) for one in readings], "times that can be read")
    return _plain(texts)


def _inside(value: object) -> object:
    """Return the time in an object of MongoDB's, {"$date": ...}, also as JSON text; any other value as it is."""
    if isinstance(value, str) and value.startswith('{"$'):
        try:
            value = json.loads(value)
        except ValueError:
            return value
    while isinstance(value, dict) and len(value) == 1 and (name := next(iter(value))) in ("$date", "$numberLong"):
        value = value[name]
    return value


def _mixed(values: Sequence[object], are_of_kind: list[bool], kind: str) -> ValueError:
    one = next((value for value, fits in zip(values, are_of_kind, strict=True) if fits), None)
    other = next(value for value, fits in zip(values, are_of_kind, strict=True) if not fits)
    if one is None:
        return ValueError(f"{quoted(other)} has no place in an order. Write numbers, times or text")
    return ValueError(
        f"some values are {kind}, as {quoted(one)}, and others are not, as {quoted(other)}, so their order is not known. Write all "
        "in one form"
    )


def _times(text: str) -> list[datetime.datetime]:
    """Return the times that a text may mean: several if day, month and year may be in another order; none if it is no time."""
    text = _ZONE.sub("", text.strip())
    try:
        return [parser.isoparse(text)]
    except ValueError:
        pass
    if _PARTS_OF_A_TIME.search(text) is None:
        return []
    orders = ((False, False),) if _YEAR_FIRST.match(text) else ((False, False), (True, False), (False, True))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", parser.UnknownTimezoneWarning)
            first, *others = [
                parser.parse(text, dayfirst=day, yearfirst=year, default=_DEFAULTS[0]) for day, year in orders
            ]
            is_complete = parser.parse(text, default=_DEFAULTS[1]) == first
    except (ValueError, OverflowError, parser.UnknownTimezoneWarning):
        return []
    return [first, *others] if is_complete else []


def _one_order(texts: Sequence[str], readings: Sequence[list[datetime.datetime]]) -> list[datetime.datetime]:
    """Return the times, whose order must be the same however they are read."""
    zones = [one[0].tzinfo is not None for one in readings]
    if any(zones) and not all(zones):
        raise _mixed(texts, zones, "times with an offset")
    first = [one[0] for one in readings]
    for number in range(1, max(map(len, readings))):
        other = [one[min(number, len(one) - 1)] for one in readings]
        if _ranks(first) != _ranks(other):
            differs = next(
                text for text, one in zip(texts, readings, strict=True) if one[min(number, len(one) - 1)] != one[0]
            )
            raise ValueError(f"{quoted(differs)} may be one of two dates, and the order depends on which. {_ISO}")
    return first


def _ranks(times: Sequence[datetime.datetime]) -> list[int]:
    places = {time: number for number, time in enumerate(sorted(set(times)))}
    return [places[time] for time in times]


def _plain(texts: list[str]) -> list[str]:
    """Return texts to be compared as such. Raises: ValueError: times that cannot be read, or numbers inside of texts."""
    unread = next((text for text in texts if _CLOCK.search(text)), None)
    if unread is not None:
        raise ValueError(f"{quoted(unread)} is not a time that can be read. {_ISO}")
    if len({_DIGITS.sub("0", text) for text in texts}) == 1 and len(set(map(len, texts))) > 1:
        shortest, longest = min(texts, key=len), max(texts, key=len)
        raise ValueError(
            f"{quoted(shortest)} and {quoted(longest)} have numbers of different lengths, so as text their order would be another one. "
            "Write numbers, or fill them with zeros"
        )
    return texts
