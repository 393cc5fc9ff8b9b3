"""The report page of folders in which anything may stand: it is always written, and exits with 0."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from report_samples import write_records, write_run, write_samples, write_suspects, write_sweep, write_verdict

from offline_kto.train.config import TrainConfig
from offline_kto.train.diagnostics.training import Settings
from offline_kto.train.report.report import write_report

ODD: list[Any] = [
    *(None, True, "", "text", "nan", "\ud800\x00\u202e", "<b>", [], {}, [[]], [1, [2, {}]], {"a": {"b": None}}),
    *(-1, 0, 1, 2**53, 2**63, -(2**63) - 1, 2**64, 10**30, 10**100, 10**308, 10**400, -(10**400)),
    *(1e-320, 1e30, 1e99, 1e101, 1e200, 1.7e308, -1.7e308, float("inf"), float("-inf"), float("nan"), 0.5, -0.0),
]
values = st.one_of(
    st.sampled_from(ODD),
    st.integers(-(10**40), 10**40),
    st.floats(),
    st.text(max_size=6),
    st.lists(st.sampled_from(ODD), max_size=5),
    st.dictionaries(st.text(max_size=4), st.sampled_from(ODD), max_size=3),
)


def places(content: Any, above: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths of all values in JSON; of a list its first and last entries alone."""
    found = [above]
    entries = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, one in entries:
        if not isinstance(content, list) or key < 2 or key == len(content) - 1:
            found += places(one, (*above, key))
    return found


def changed(content: Any, place: tuple[Any, ...], value: Any) -> Any:
    if not place:
        return value
    copy = content.copy()
    copy[place[0]] = changed(content[place[0]], place[1:], value)
    return copy


def damaged(draw: Any, content: Any) -> Any:
    """With up to four values in it, of those that are left, replaced."""
    for _ in range(draw(st.integers(1, 4))):
        content = changed(content, draw(st.sampled_from(places(content))), draw(values))
    return content


def text_of(content: Any) -> str:
    """JSON as anybody may write it: with NaN, and numbers of any length."""
    return json.dumps(content)


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run and a sweep, small, the run with values before training and with texts."""
    folder = tmp_path_factory.mktemp("samples")
    alarms = Settings.of(TrainConfig(), (1.0, 1.0), (10, 10)).__dict__
    for run in (write_run(folder / "run", steps=60), write_sweep(folder / "sweep", trials=3)):
        for path in run.rglob("trials/*/metrics.jsonl"):
            path.write_text("".join(path.read_text().splitlines(keepends=True)[40:55]))
        for name in ("run.json", "sweep.json"):
            if (run / name).exists():
                record = json.loads((run / name).read_text())
                record["data"]["lengths"] = {key: some[:5] for key, some in record["data"]["lengths"].items()}
                record |= {
                    "alarms": alarms,
                    "total_updates": 80,
                    "final": {"step": 50},
                    "warnings": ["a"],
                    "planned": 3,
                }
                (run / name).write_text(json.dumps(record))
    write_verdict(folder / "run")
    write_samples(folder / "run", {"a": "b"})
    write_suspects(folder / "run", [{"kind": "duplicate", "place": "a:1", "label": "desirable", "reward": "1"}])
    return folder


# Shrinking would take minutes; what broke is printed.
LIMITS = settings(
    max_examples=20 * int(os.environ.get("FUZZ_TIMES", "1")),
    phases=(Phase.explicit, Phase.reuse, Phase.generate),
    deadline=None,
    suppress_health_check=list(HealthCheck),
)


@pytest.mark.slow
@LIMITS
@given(data=st.data())
def test_any_value_in_any_place_of_a_run(samples: Path, tmp_path: Path, data: st.DataObject) -> None:
    folder = tmp_path / "run"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(samples / "run", folder)
    for name in data.draw(
        st.sets(
            st.sampled_from(["run.json", "evaluation.json", "config.yaml", "metrics.jsonl", "samples.jsonl"]),
            min_size=1,
        )
    ):
        path = folder / name
        if name == "metrics.jsonl":
            lines = [json.loads(line) for line in path.read_text().splitlines()]
            write_records(
                folder, [one for line in lines for one in [damaged(data.draw, line) if line["step"] > 56 else line]]
            )
            keys = data.draw(st.sets(st.sampled_from(list(lines[0])), max_size=4)) - {"step"}
            write_records(
                folder, [{**line, **dict.fromkeys(keys, data.draw(st.sampled_from(ODD)))} for line in lines[:12]]
            )
        elif name == "samples.jsonl":
            lines = [json.loads(line) for line in path.read_text().splitlines()]
            path.write_text("".join(text_of(damaged(data.draw, line)) + "\n" for line in lines))
        else:
            content = yaml.safe_load(path.read_text()) if name == "config.yaml" else json.loads(path.read_text())
            path.write_text(text_of(damaged(data.draw, content)))
    page = write_report([folder]).read_text()
    assert page.rstrip().endswith("</html>")
    assert not set("\x00\u202e") & set(page)


@pytest.mark.slow
@LIMITS
@given(data=st.data())
def test_any_value_in_any_place_of_a_sweep(samples: Path, tmp_path: Path, data: st.DataObject) -> None:
    folder = tmp_path / "sweep"
    if not folder.exists():
        shutil.copytree(samples / "sweep", folder)
    content = json.loads((samples / "sweep" / "sweep.json").read_text())
    (folder / "sweep.json").write_text(text_of(damaged(data.draw, content)))
    options = yaml.safe_load((samples / "sweep" / "sweep.yaml").read_text())
    (folder / "sweep.yaml").write_text(text_of(damaged(data.draw, options)))
    assert write_report([folder, samples / "run"], tmp_path / "page.html").read_text().rstrip().endswith("</html>")


@pytest.mark.parametrize(
    "value",
    [None, "text", [1, [2, {}]], {"a": None}, -1, 0, 2**64, 10**400, 1e99, -1.7e308, float("nan"), 1e-320],
    ids=str,
)
def test_one_value_everywhere(samples: Path, tmp_path: Path, value: Any) -> None:
    """Each number of a run and of a sweep at once, so that no plot has another scale."""

    def everywhere(content: Any) -> Any:
        if isinstance(content, dict):
            return {key: one if key in ("step", "number") else everywhere(one) for key, one in content.items()}
        if isinstance(content, list):
            return [everywhere(one) for one in content]
        return value

    for name in ("run", "sweep"):
        folder = shutil.copytree(samples / name, tmp_path / name)
        for path in [*folder.glob("*.json"), *folder.glob("*.yaml")]:
            path.write_text(text_of(everywhere(yaml.safe_load(path.read_text()))))
        for path in folder.rglob("metrics.jsonl"):
            write_records(path.parent, [everywhere(json.loads(line)) for line in path.read_text().splitlines()])
        write_report([folder])
    write_report([tmp_path / "run", tmp_path / "sweep", samples / "run"], tmp_path / "page.html")


def test_numbers_that_are_left_out_are_noted(samples: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(samples / "run", tmp_path / "run")
    write_records(folder, [{"step": 1, "loss": 10**400}, {"step": 2, "loss": float("nan")}, {"step": 3, "loss": 0.5}])
    (folder / "evaluation.json").write_text('{"metrics": {"loss": {"value": ' + "9" * 5000 + "}}}")
    page = write_report([folder]).read_text()
    assert "metrics.jsonl has 2 numbers that are infinite, not a number or beyond 1e+100: left out." in page
    assert "evaluation.json has 1 number that is infinite, not a number or beyond 1e+100: left out." in page


@pytest.mark.parametrize(
    "text",
    [
        "9" * 5000,
        "[" * 5_000,
        '{"a":' * 900 + "1" + "}" * 900,
        '{"a":' * 100_000,
        "1e999999",
        "-" + "9" * 400,
        '"\\ud800"',
        "\x00",
    ],
    ids=["digits", "open lists", "nested", "open objects", "exponent", "negative", "half a character", "zero"],
)
def test_what_json_cannot_be_read_as(samples: Path, tmp_path: Path, text: str) -> None:
    for name in ("run", "sweep"):
        folder = shutil.copytree(samples / name, tmp_path / name)
        for path in [*folder.glob("*.json"), *folder.glob("*.yaml")]:
            record = json.loads(path.read_text()) if path.suffix == ".json" else {"beta": 0.1}
            path.write_text(json.dumps({**record, "command": 0, "extra": 1})[:-2] + text + "}")
        for path in folder.rglob("metrics.jsonl"):
            path.write_text(
                path.read_text() + f'{{"step": 61, "loss": {text}}}\n{{"step": {text}, "loss": 1}}\n{text}\n'
            )
        write_report([folder])


@pytest.mark.parametrize("value", [1e30, 1e200, 1.7e308, -1.7e308, np.inf, np.nan, 1e-320])
def test_any_log_ratio(samples: Path, tmp_path: Path, value: float) -> None:
    folder = shutil.copytree(samples / "run", tmp_path / "run")
    for mix in ([value] * 40, [value, -value, 0.0, 1.0] * 10):
        columns = {"split": ["train", "held_out"] * 20, "label": [True, True, False, False] * 10, "logratio": mix}
        pq.write_table(pa.table(columns), folder / "rewards.parquet")
        write_report([folder])


def test_a_time_that_no_calendar_has(samples: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(samples / "run", tmp_path / "run")
    os.utime(folder / "metrics.jsonl", (1e17, 1e17))
    write_report([folder])
