"""Count and sort places in the feedback, of which messages name the first."""

import re
from dataclasses import dataclass


@dataclass
class Places:
    """Places of which something is said: how many there are, and the first."""

    count: int = 0
    first: str = ""

    def add(self, where: str) -> None:
        """Add a place that comes after all others."""
        self.first = self.first or where
        self.count += 1

    def merge(self, later: "Places") -> None:
        """Add places that come after all others."""
        self.first = self.first or later.first
        self.count += later.count

    def __bool__(self) -> bool:
        return self.count > 0

    def __str__(self) -> str:
        return f"{self.count:,} (first: {self.first})"


def place_key(where: str) -> list[int | str]:
    """Return a key that sorts places in the order of the data: line 9 comes before line 10."""
    return [int(part) if number % 2 else part for number, part in enumerate(re.split(r"([0-9]+)", where))]
