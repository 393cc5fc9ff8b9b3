"""Check that a worker has the model, the tokenizer and the libraries that the plan was made with."""

from collections.abc import Mapping
from typing import cast

from offline_kto.kto_core.cache.manifest_fields import IDENTITY_FIELDS, ScoringSections
from offline_kto.kto_core.errors import ModelError, printable

# What a row is made of was settled by the plan: a worker reads ids.
_CHECKED = ("reference", "tokenizer", "scorer")


def check_same_reference(found: ScoringSections, planned: ScoringSections, *, host: str) -> None:
    """Compare a worker's reference with the plan's.

    Args:
        found: what the worker finds on its host.
        planned: what the leader found, as in the manifest.
        host: the worker's, for the message.

    Raises:
        ModelError: a field that can change a score, or the version of a library, differs.
    """
    here, there = _fields(found), _fields(planned)
    differing = [
        f"{name}: {_short(here.get(name))} there, {_short(there.get(name))} in the plan"
        for name in sorted({*here, *there})
        if here.get(name) != there.get(name)
    ]
    if differing:
        raise ModelError(
            f"{host}: this worker would give other scores. {'; '.join(differing)}. Every node needs the same model and the "
            "same versions: put the model on storage that all nodes see, and use one image or environment for all."
        )


def _fields(sections: ScoringSections) -> dict[str, object]:
    named = cast("Mapping[str, Mapping[str, object]]", sections)
    fields = {f"{part}.{name}": named[part].get(name) for part in _CHECKED for name in IDENTITY_FIELDS[part]}
    versions = sections["scorer"]["versions"]
    return {**fields, **{f"version of {name}": version for name, version in versions.items()}}


def _short(value: object) -> str:
    """Return a value for a message: hashes by their beginning."""
    return "none" if value is None else printable(str(value), 40)[:20]
