"""Name the place of a row in the feedback, as error messages do: `feedback.jsonl:12`.

A cache that kto-precompute writes has the places in an optional column. They decide no score and no label: a row that
moves to another line keeps both.
"""

from typing import Final

import pyarrow as pa
import pyarrow.compute as pc

from offline_kto.kto_core.errors import printable

PLACE: Final = "place"

# Characters. A file's name has at most 255 bytes, and folders may stand before it.
LONGEST_PLACE = 256

# What follows the name of the file, or of the data set.
_INSIDE = r":(?:\d+(?: \(record \d+\))?| row \d+)$"


def place_of(where: str) -> str:
    """Return the place of a record for the cache: printable, short, and without the folders outside of `--data`.

    Args:
        where: as error messages name it.
    """
    if where.startswith(("/", "../")):  # a link that leads out of the folder
        where = where.rpartition("/")[2]
    place = where if where.isprintable() else printable(where)  # a plan keeps many of them: no copy
    return place if len(place) <= LONGEST_PLACE else "..." + place[3 - LONGEST_PLACE :]


def place_in_words(place: str | None, source: int) -> str:
    """Return the place of a row, or its number in the input where the cache has no places."""
    return f"record {source}" if place is None else place


def files_of(places: pa.Array) -> pa.Array:
    """Return the name of the file, or of the data set, in each place."""
    return pc.replace_substring_regex(places, pattern=_INSIDE, replacement="")
