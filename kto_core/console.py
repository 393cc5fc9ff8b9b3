"""Lines for people on standard output."""

from offline_kto.kto_core.errors import printable
from offline_kto.kto_core.redaction import hidden


def tell(line: str) -> None:
    """Print a line at once. Names in it may come from anybody: nothing in them drives the terminal, no secret is shown."""
    print(printable(hidden(line)), flush=True)
