"""Find the formats of the records of a file that cannot be read, because a file is read in one format."""

from collections.abc import Mapping
from itertools import islice

from offline_kto.kto_core.errors import FeedbackError
from offline_kto.kto_core.feedback.columns import COMPLETIONS, CONVERSATIONS, LABELS, PROMPTS
from offline_kto.kto_core.feedback.presets import recognised
from offline_kto.precompute.config import PrecomputeConfig
from offline_kto.precompute.feedback.data_format import DataFormat, shape

# Records whose formats are looked at.
_LOOKED_AT = 100_000
# The native formats, which one file may mix.
_NATIVE = "prompt and completion, messages, or chosen and rejected"


def with_formats(error: FeedbackError, config: PrecomputeConfig, data_format: DataFormat) -> FeedbackError:
    """Return the error, preceded by the formats of the records if there are several and no option chooses one."""
    if config.map is not None or config.prompt_field is not None or config.completion_field is not None:
        return error
    found = _formats(config, data_format)
    if len(found) < 2:
        return error
    shown = "; ".join(
        f"{name}: {count:,} {'record' if count == 1 else 'records'} (first: {first})"
        for name, (count, first) in found.items()
    )
    read_as = _NATIVE if data_format.mapping is None else data_format.mapping.name
    return FeedbackError(
        f"{config.data}: the records have several formats, and all are read as one ({read_as}): {shown}. Save the records of each "
        f"format in a file of its own, and convert one of them to the other's columns to train on both.\n{error}"
    )


def _formats(config: PrecomputeConfig, data_format: DataFormat) -> dict[str, tuple[int, str]]:
    """Return how many records have each format, and where the first is; records of no known format do not count."""
    found: dict[str, tuple[int, str]] = {}
    names: dict[object, str | None] = {}
    most = _LOOKED_AT if config.limit is None else min(config.limit, _LOOKED_AT)
    try:
        for where, record in islice(data_format.records(None), most):
            if (keys := shape(record)) not in names:
                names[keys] = _name(record, where)
            if (name := names[keys]) is not None:
                count, first = found.get(name, (0, where))
                found[name] = count + 1, first
    except FeedbackError:  # the file cannot be read any further
        pass
    return found


def _name(record: Mapping[str, object], where: str) -> str | None:
    mapping = recognised(record, where)
    if mapping is not None:
        return mapping.name
    there = {name for name, value in record.items() if value is not None}
    sides = not there.isdisjoint(PROMPTS) and not there.isdisjoint(COMPLETIONS)
    labelled = not there.isdisjoint(LABELS) and (sides or not there.isdisjoint(CONVERSATIONS))
    return _NATIVE if labelled or {"chosen", "rejected"} <= there else None
