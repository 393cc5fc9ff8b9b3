"""Join the records of a file that belong together, such as the messages of one conversation."""

from collections.abc import Iterable, Iterator
from typing import Any

from offline_kto.kto_core.feedback.paths import Path
from offline_kto.kto_core.feedback.quoting import quoted
from offline_kto.precompute.records.text_files import Located


def joined(records: Iterable[Located], key: Path) -> Iterator[Located]:
    """Yield one record for each value of `key`: the first with this value, with all of them as its `rows`.

    Records in which nothing is at the key are joined to one. The order is that of the first records.
    """
    groups: dict[str, tuple[str, list[dict[str, Any]]]] = {}
    for where, record in records:
        _, rows = groups.setdefault(quoted(key.find(record, where), 200), (where, []))
        rows.append(record)
    for where, rows in groups.values():
        yield where, {**rows[0], "rows": rows}
