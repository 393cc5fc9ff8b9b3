import json
from pathlib import Path

import pytest
from declared_fields import departures, documented

from offline_kto.kto_core.cache import manifest_fields
from offline_kto.kto_core.cache.manifest import Manifest, read_manifest
from offline_kto.kto_core.cache.manifest_fields import CHECKS, SECTIONS, SHARD_CHECKS, Sections, ShardFields


def test_each_field_is_explained() -> None:
    for name, (fields, explained) in documented(manifest_fields).items():
        if name not in ("ScoringSections", "Sections"):  # their fields are records
            assert explained == fields, name


def test_a_written_manifest_has_the_declared_fields(cache: Path) -> None:
    content = json.loads((cache / "manifest.json").read_bytes())
    assert list(content) == ["format", "created", "fingerprint", *SECTIONS, "shards", "checksum"]
    assert departures({name: content[name] for name in SECTIONS}, Sections) == []
    assert [departures(shard, ShardFields) for shard in content["shards"]] == [[]]


def test_the_fields_are_in_the_declared_order(cache: Path) -> None:
    """Compare with the order in the file, so that the typed records describe it."""
    manifest = read_manifest(cache)
    for section, record in Sections.__annotations__.items():
        declared = [name for name in record.__annotations__ if name in getattr(manifest, section)]
        assert list(getattr(manifest, section)) == declared


def test_checks_are_of_declared_fields() -> None:
    for section, checks in CHECKS.items():
        assert checks.keys() <= Sections.__annotations__[section].__annotations__.keys()
    assert SHARD_CHECKS.keys() == ShardFields.__annotations__.keys()
    assert set(SECTIONS) == Sections.__annotations__.keys()
    assert set(SECTIONS) < Manifest.__annotations__.keys()


@pytest.mark.parametrize(
    ("content", "found"),
    [
        ({"colour": 1}, [".colour is not declared"]),
        ({"reference": {"id": 3}}, [".reference.id: 3 is no <class 'str'>"]),
        ({"data": {"files": [{"bytes": True}]}}, [".data.files[].bytes: True is no <class 'int'>"]),
        ({"run": {"seconds": 3}, "reference": {"revision": None}}, []),
    ],
)
def test_departures_are_seen(content: dict[str, object], found: list[str]) -> None:
    assert departures(content, Sections) == found
