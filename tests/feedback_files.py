"""Small feedback files with random but fixed content."""

import json
import random
from pathlib import Path
from typing import Any

_WORDS = ["hello", "world", "or", "he", "well", "red", "blue", "stone", "river", "seven", "maybe", "never", "went"]


def chat_rows(count: int, *, seed: int = 0, longest: int = 12) -> list[dict[str, Any]]:
    """Conversational rows: every third prompt has two completions, labels are mixed."""
    rng = random.Random(seed)

    def text() -> str:
        return " ".join(rng.choice(_WORDS) for _ in range(rng.randint(1, longest)))

    rows: list[dict[str, Any]] = []
    while len(rows) < count:
        prompt = [{"role": "user", "content": text()}]
        for _ in range(2 if rng.random() < 0.5 else 1):
            completion = [{"role": "assistant", "content": f"{text()} {len(rows)}"}]
            rows.append({"prompt": prompt, "completion": completion, "label": rng.random() < 0.5})
    return rows[:count]


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Write rows as JSONL; returns `path`."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_feedback(path: Path, count: int, *, seed: int = 0) -> Path:
    """`chat_rows` as JSONL; returns `path`."""
    return write_rows(path, chat_rows(count, seed=seed))
