"""The report page: what it reads, what it makes of damage and malice, and what a browser shows."""

import base64
import hashlib
import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from report_samples import COMMAND, records, write_records, write_rewards, write_run, write_sweep

from offline_kto.kto_core.errors import ConfigError
from offline_kto.kto_core.lock import only_writer
from offline_kto.train.report import figures, sweep_figures
from offline_kto.train.report import folders as report_folders
from offline_kto.train.report import words as report_words
from offline_kto.train.report.report import write_report

ROOT = Path(__file__).resolve().parents[1]
HOSTILE = "</script><img src=x onerror=alert(1)>{{ 7 * 7 }}<!--<script>"


class _Elements(HTMLParser):
    """Elements by tag with their attributes; text outside scripts and styles; JSON by the script's id."""

    def __init__(self, page):
        super().__init__()
        self.found, self.text, self.scripts, self._in = [], [], {}, None
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))
        self._in = (tag, dict(attrs).get("id")) if tag in ("script", "style") else None

    def handle_endtag(self, tag):
        self._in = None

    def handle_data(self, data):
        if self._in is None:
            self.text.append(data)
        elif self._in[1]:
            self.scripts[self._in[1]] = self.scripts.get(self._in[1], "") + data


def read(path):
    elements = _Elements(path.read_text(encoding="utf-8"))
    return elements, re.sub(r"\s+", " ", " ".join(elements.text))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("made") / "runs" / "first")


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    return write_sweep(tmp_path_factory.mktemp("made") / "sweeps" / "search", trials=32)


@pytest.fixture(scope="module")
def pages(run, sweep, tmp_path_factory):
    out = tmp_path_factory.mktemp("pages")
    other = write_run(out / "runs" / "second", seed=1, gain=1.5)
    return {
        "run": write_report([run]),
        "sweep": write_report([sweep]),
        "several": write_report([run, other, sweep], out / "several.html"),
    }


def test_a_run_says_its_results_in_words(pages, run):
    assert pages["run"] == run / "report.html"
    elements, text = read(pages["run"])
    assert "Held-out accuracy 71 % [64, 78] after 300 updates" in text
    assert "120 rows of 60 prompts, after 300 updates. 95 % intervals from 1,000 bootstrap resamples" in text
    for part in (COMMAND, "3f1c" * 8, "2.13.0", "feedback.jsonl", "finished", "[0.378, 0.446]"):
        assert part in text, part
    assert {"Unreadable content", "Warnings"} & set(map(str.strip, elements.text)) == set()


def test_a_page_needs_nothing_from_anywhere(pages):
    for path in pages.values():
        elements, _ = read(path)
        for tag, attrs in elements.found:
            assert tag not in ("iframe", "object", "embed", "base"), tag
            assert "src" not in attrs, tag
            assert attrs.get("href", "#").startswith(("#", "data:")), attrs
            assert not {"style", *(name for name in attrs if name.startswith("on"))} & set(attrs), attrs
        assert path.stat().st_size < 1.5e6


def test_a_page_allows_no_script_and_no_style_but_its_own(pages):
    for path in pages.values():
        page = path.read_text(encoding="utf-8")
        (policy,) = [attrs["content"] for tag, attrs in read(path)[0].found if attrs.get("http-equiv")]
        for kind, element in (("script-src", "script"), ("style-src", "style")):
            (text,) = re.findall(rf"<{element}>(.*?)</{element}>", page, re.DOTALL)
            digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
            assert f"{kind} 'sha256-{digest}'; " in policy
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy


def test_a_sweep_has_all_trials_the_best_one_first(pages, sweep):
    elements, text = read(pages["sweep"])
    record = json.loads((sweep / "sweep.json").read_text())
    rows = [int(attrs["data-trial"]) for tag, attrs in elements.found if tag == "tr" and "data-trial" in attrs]
    assert sorted(rows) == list(range(32))
    values = [record["trials"][index]["value"] for index in rows]
    assert rows[0] == record["best"]
    assert values[:29] == sorted(value for value in values if value is not None)
    assert "TrainingError: the loss became nan at step 121" in text
    assert f"kto-train --config {sweep}/best.yaml --out runs/best" in text


def test_of_a_metric_to_maximize_the_highest_is_best(tmp_path):
    folder = write_sweep(tmp_path / "up", trials=8)
    record = json.loads((folder / "sweep.json").read_text())
    record |= {"direction": "maximize", "best": None}
    (folder / "sweep.json").write_text(json.dumps(record))
    found = report_folders.read_folder(folder)
    assert found.best.value == max(trial["value"] for trial in record["trials"] if trial["value"] is not None)


def test_a_sweep_is_shown_in_a_line(sweep):
    found = report_folders.read_folder(sweep)
    assert len(repr(found)) < 300
    assert f"of {len(found.trials)} trials complete" in repr(found)
    assert f"best eval/loss: Trial({found.best.number}, complete, value {found.best.value}, " in repr(found)


def test_several_folders_stand_side_by_side(pages, tmp_path, monkeypatch, run):
    elements, text = read(pages["several"])
    assert "3 folders compared" in text
    assert [attrs["class"] for tag, attrs in elements.found if tag == "details"].count("part") == 3
    monkeypatch.chdir(tmp_path)
    twin = shutil.copytree(run, tmp_path / "elsewhere" / "first")
    assert write_report([run, twin]) == Path("report.html")
    assert "elsewhere/first" in read(Path("report.html"))[1]


def test_a_sweep_is_compared_by_its_best_trial(pages, sweep):
    best = report_folders.read_folder(sweep).best
    rows = read(pages["several"])[0].found
    assert ("th", {"scope": "row", "data-sort": f"search, trial {best.number}"}) in rows
    assert ("th", {"scope": "row", "data-sort": "second"}) in rows


def test_trials_of_another_sweeper_are_read_where_they_are(tmp_path):
    folder = write_sweep(tmp_path / "mine", trials=8)
    other = write_sweep(tmp_path / "other", trials=8)
    record = json.loads((folder / "sweep.json").read_text())
    for trial in record["trials"]:
        trial["folder"] = str(other / "trials" / f"{trial['number']:04d}")
    record["trials"][3]["folder"] = "\x00"
    (folder / "sweep.json").write_text(json.dumps(record))
    for number in (2, 3):
        shutil.rmtree(folder / f"trials/{number:04d}")
    found = report_folders.read_folder(folder).trials
    assert [trial.run and trial.run.path.parent.parent.name for trial in found[:4]] == ["mine", "mine", "other", None]


def test_what_was_warned_of_and_dropped_before_is_said(run, tmp_path):
    folder = shutil.copytree(run, tmp_path / "run")
    record = json.loads((folder / "run.json").read_text())
    record |= {"warnings": ["every training row is desirable: <b>"], "data": {**record["data"], "dropped": 18}}
    (folder / "run.json").write_text(json.dumps(record))
    text = read(write_report([folder]))[1]
    assert "Warnings Every training row is desirable: <b>" in text
    assert "18 rows dropped because their prompt leaves no room" in text
    assert "2 completions that carry both labels" in text


def test_equal_trials_have_no_worst_one(tmp_path):
    folder = write_sweep(tmp_path / "same", trials=4)
    record = json.loads((folder / "sweep.json").read_text())
    for trial, value in zip(record["trials"], (0.4999871, 0.4999872, 0.5, 0.5), strict=True):
        trial["value"] = value
    (folder / "sweep.json").write_text(json.dumps(record | {"best": 0}))
    assert "held-out loss, 0.499987; the 4 complete trials reach up to 0.5." in read(write_report([folder]))[1]
    for trial in record["trials"]:
        trial["value"] = 0.5
    (folder / "sweep.json").write_text(json.dumps(record | {"best": 0}))
    assert "held-out loss, 0.5; so have the other complete trials." in read(write_report([folder]))[1]


def test_what_is_no_run_is_refused(tmp_path, run):
    (tmp_path / "empty").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("x")
    for name, found in (("none", "no such folder"), ("empty", "is empty"), ("other", "contains notes.txt")):
        with pytest.raises(ConfigError, match=rf"{name}: .*{found}.*Name the folder"):
            write_report([tmp_path / name])
    with pytest.raises(ConfigError, match="it is a file"):
        write_report([run / "run.json"])
    with pytest.raises(ConfigError, match="no folder given"):
        write_report([])
    with pytest.raises(ConfigError, match=r"a folder of that name exists.*html"):
        write_report([run], tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"config.json: a file of that name exists and is not a report"):
        write_report([run], tmp_path / "config.json")
    with pytest.raises(ConfigError, match="cannot be written"):
        write_report([run], tmp_path / "other" / "notes.txt" / "page.html")
    assert (tmp_path / "config.json").read_text() == "{}"


@pytest.mark.parametrize("name", ["config.yaml", "run.json", "metrics.jsonl", "evaluation.json", "rewards.parquet"])
@pytest.mark.parametrize("damage", ["gone", "empty", "cut", "noise", "list"])
def test_a_damaged_file_costs_only_what_it_held(name, damage, run, tmp_path):
    folder = shutil.copytree(run, tmp_path / "run")
    path = folder / name
    content = path.read_bytes()
    damaged = {"empty": b"", "cut": content[: len(content) // 2], "noise": b"\xff\x00{[" * 9, "list": b"[1, 2]\n"}
    path.unlink()
    if damage != "gone":
        path.write_bytes(damaged[damage])
    _, text = read(write_report([folder]))
    if name != "metrics.jsonl":
        assert "after 300 updates" in text
    if damage in ("noise", "list") and name != "config.yaml":
        assert f"{name} " in text.split("Unreadable content")[1]


def test_every_prefix_of_the_metrics_gives_a_page(run, tmp_path):
    folder = shutil.copytree(run, tmp_path / "run")
    whole = (folder / "metrics.jsonl").read_bytes()
    for end in [*range(0, 900, 90), len(whole) - 1]:
        (folder / "metrics.jsonl").write_bytes(whole[:end])
        write_report([folder])


def test_odd_values_give_a_page(tmp_path):
    odd = [None, True, -1, 10**400, "text", [], {}, [1, [2]], float("nan"), {"a": None}]
    for index, value in enumerate(odd):
        folder = tmp_path / f"run{index}"
        folder.mkdir()
        keys = ("versions", "data", "reference", "weights", "started", "command", "precision")
        (folder / "run.json").write_text(json.dumps(dict.fromkeys(keys, value)))
        (folder / "config.yaml").write_text(json.dumps({"beta": value, "epochs": value, "loss": value}))
        (folder / "evaluation.json").write_text(json.dumps({"metrics": {"loss": value, "kl": {"value": value}}}))
        names = ("loss", "accuracy", "kl", "rewards/margins", "train_runtime", "eval/loss", "epoch")
        write_records(folder, [{"step": step, **dict.fromkeys(names, value)} for step in (1, 2)])
        write_report([folder])
        data = {"data": {"lengths": value, "files": value, "desirable": value}}
        (folder / "run.json").write_text(json.dumps(data))
        write_report([folder])
        trial = {"number": 0, **dict.fromkeys(("state", "params", "value", "metrics", "seconds", "reason"), value)}
        record = {"trials": [trial, value], "space": value, "importance": value, "best": value, "metric": value}
        (folder / "sweep.json").write_text(json.dumps(record))
        write_report([folder])


def test_a_run_that_goes_on_has_a_page(tmp_path):
    folder = write_run(tmp_path / "run")
    (folder / "evaluation.json").unlink()
    (folder / "rewards.parquet").unlink()
    write_records(folder, records(120, end=False))
    record = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps({**record, "total_updates": 300}))
    assert "after 120 of 300 updates; reward margin" in read(write_report([folder]))[1]
    (folder / ".lock").write_text("process 1 on host")  # as a crash leaves it
    assert "; the run has not finished." in read(write_report([folder]))[1]
    with only_writer(folder, ConfigError):
        _, text = read(write_report([folder]))
    assert "; still running." in text
    assert "Held-out accuracy" in text


def test_nothing_from_a_file_becomes_markup(tmp_path):
    folder = write_sweep(tmp_path / "<b>sweep", trials=4)
    record = json.loads((folder / "sweep.json").read_text())
    for trial in record["trials"]:
        trial.update(reason=HOSTILE, host=HOSTILE, params={HOSTILE: HOSTILE + str(trial["number"]), "beta": 0.1})
    record |= {"command": HOSTILE, "metric": HOSTILE, "importance": {HOSTILE: 1.0}, "reference": {"id": HOSTILE}}
    record |= {"started": HOSTILE, "versions": {HOSTILE: HOSTILE}, "fingerprint": HOSTILE}
    record["data"]["files"] = [HOSTILE]
    (folder / "sweep.json").write_text(json.dumps(record))
    run = write_run(tmp_path / "<img src=x onerror=alert(1)>")
    elements, text = read(write_report([folder, run], tmp_path / "page.html"))
    tags = [tag for tag, _ in elements.found]
    assert "img" not in tags
    assert tags.count("script") == 3
    assert HOSTILE in text
    assert "49" not in text.split(HOSTILE.split("{{", maxsplit=1)[0])[1][:10]
    assert json.loads(elements.scripts["figures"])
    assert json.loads(elements.scripts["sources"])[1]["name"] == run.name


@pytest.mark.slow
def test_a_hundred_thousand_records_and_a_million_rows_stay_small(tmp_path):
    folder = write_run(tmp_path / "long", steps=2)
    line = {"step": 0, "loss": 0.5, "rewards/chosen": 0.1, "rewards/rejected": -0.1, "kl": 0.0, "accuracy": 0.5}
    draw = np.random.default_rng(0).normal(0.5, 0.1, 100_000)
    write_records(folder, ({**line, "step": i, "loss": float(x)} for i, x in enumerate(draw)))
    write_rewards(folder, rows=1_000_000)
    assert write_report([folder]).stat().st_size < 1.5e6


def test_thinned_curves_keep_their_extremes():
    values = np.random.default_rng(1).normal(size=50_000)
    values[777], values[31_234], values[40] = 99.0, -99.0, np.nan
    steps, kept = figures.thinned(np.arange(50_000.0), values)
    assert len(kept) <= 1002
    assert (kept[0], kept[-1], np.nanmax(kept), np.nanmin(kept)) == (values[0], values[-1], 99.0, -99.0)
    assert (np.diff(steps) > 0).all()
    assert steps[np.nanargmax(kept)] == 777


def test_running_means_against_the_plain_way():
    values = np.random.default_rng(2).normal(size=100)
    values[[3, 4, 50]] = np.nan
    for window in (1, 2, 7):
        plain = [np.nanmean(values[max(0, i + 1 - window) : i + 1]) if v == v else v for i, v in enumerate(values)]
        np.testing.assert_allclose(figures.running_mean(values, window), plain)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.123456, "0.1235"),
        (1234567.8, "1,234,568"),
        (1e-6, "1e-6"),
        (-2.5e-7, "\u22122.5e-7"),
        (3, "3"),
        (12000, "12,000"),
        (-0.5, "\u22120.5"),
        (None, "–"),
        (True, "yes"),
        (float("nan"), "–"),
        (10**400, "–"),
        ("kto", "kto"),
    ],
)
def test_numbers_as_the_page_writes_them(value, text):
    assert report_words.shown(value) == text


def test_importing_the_report_loads_nothing_heavy():
    heavy = "{'torch', 'transformers', 'pyarrow', 'numpy', 'jinja2', 'pandas'}"
    program = f"import sys, offline_kto.train.report.report; print(*sorted(set(sys.modules) & {heavy}))"
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT)
    assert ran.stdout.split() == []


def test_writing_a_report_needs_no_torch(run, tmp_path):
    program = (
        "import sys; from pathlib import Path; from offline_kto.train.report.report import write_report\n"
        f"write_report([Path({str(run)!r})], Path({str(tmp_path / 'p.html')!r})); print('torch' in sys.modules)"
    )
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT)
    assert ran.stdout.split() == ["False"]


def test_shades_tell_trials_apart_where_most_are_equal(tmp_path):
    folder = write_sweep(tmp_path / "equal", trials=5)
    record = json.loads((folder / "sweep.json").read_text())
    for trial, value in zip(record["trials"], (0.5, 0.5, 0.4, 0.5, 0.5), strict=True):
        trial["value"] = value
    (folder / "sweep.json").write_text(json.dumps(record | {"best": 2}))
    shades = sweep_figures.shades(report_folders.read_folder(folder))
    assert shades[2] == "var(--shade-8)"
    assert shades[0] == "var(--shade-0)"
