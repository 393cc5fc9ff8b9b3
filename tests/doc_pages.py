"""Read README.md, CONTRIBUTING.md and docs/ as tests see them: pages, and the fenced blocks in them."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md")))
}

_FENCE = re.compile(
    r"(?:^<!-- (?P<name>[a-z ]+): (?P<value>.*?) -->\n)?^```(?P<language>\w*)\n(?P<text>.*?)^```$", re.M | re.S
)


@dataclass(frozen=True)
class Block:
    """A fenced block.

    Attributes:
        language: after the fence; "" where none is named.
        name, value: of the comment directly above, as `<!-- not run: needs a GPU -->`; "" without one.
        line, last: numbers of the lines with the two fences, from 1.
    """

    language: str
    text: str
    name: str
    value: str
    line: int
    last: int

    @property
    def is_run(self) -> bool:
        """Return whether a test runs it."""
        return self.language in ("bash", "python") and self.name != "not run"


def blocks(page: str) -> list[Block]:
    """Return the fenced blocks of a page, in order."""
    return list(_blocks(PAGES[page]))


def _blocks(text: str) -> Iterator[Block]:
    for found in _FENCE.finditer(text):
        line = text.count("\n", 0, found.start("language")) + 1
        yield Block(
            found["language"],
            found["text"],
            found["name"] or "",
            found["value"] or "",
            line,
            line + found["text"].count("\n") + 1,
        )
