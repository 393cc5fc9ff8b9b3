"""What a library says, in one line."""

import pytest

from offline_kto.kto_core.errors import in_one_line

SENTENCE = "a whole sentence that says what is wrong, and with what it is wrong"


@pytest.mark.parametrize(
    ("said", "line"),
    [
        ("", "ValueError"),
        (f"{SENTENCE}\n  at 0x7f", SENTENCE),
        (f"a few words\n{SENTENCE}", "a few words"),
        (f"1 validation error for VllmConfig\n\n  {SENTENCE}\n  at", f"1 validation error for VllmConfig {SENTENCE}"),
        (f"{SENTENCE}:\nits reason\nmore", f"{SENTENCE}: its reason"),
    ],
)
def test_a_heading_brings_what_stands_under_it(said: str, line: str) -> None:
    assert in_one_line(ValueError(said)) == line


def test_it_ends() -> None:
    assert len(in_one_line(ValueError("\n".join(["abc:"] * 1000)))) < 310
