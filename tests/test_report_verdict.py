"""What the report page says first: verdicts, values before training, comparisons, texts; and that noise looks like noise."""

import json
import re
import shutil

import numpy as np
import pytest
import yaml
from report_samples import (
    CONFIG,
    run_record,
    write_evaluation,
    write_run,
    write_samples,
    write_suspects,
    write_sweep,
    write_verdict,
)
from test_report import HOSTILE, read

from offline_kto.kto_core.feedback.quoting import numbered
from offline_kto.train.report import plots, sweep_figures
from offline_kto.train.report.figures import fitted_range
from offline_kto.train.report.folders import read_folder
from offline_kto.train.report.report import write_report


@pytest.fixture(scope="module")
def judged(tmp_path_factory):
    """A run that is better than before training."""
    folder = write_run(tmp_path_factory.mktemp("made") / "judged")
    write_verdict(folder)
    return folder


@pytest.fixture
def run(judged, tmp_path):
    return shutil.copytree(judged, tmp_path / "run")


def change(folder, name, **values):
    record = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps(record | values))


def rows_of(page, section):
    """The cells of each row of a section's tables, as text."""
    part = page.split(f'aria-label="{section}"', 1)[1].split("</section>")[0]
    strip = lambda cell: re.sub(r"\s+", " ", re.sub("<[^>]+>", "", cell)).strip()  # noqa: E731
    return [[strip(cell) for cell in re.findall(r"<t[hd].*?</t[hd]>", row, re.DOTALL)] for row in part.split("<tr")[1:]]


def test_the_verdict_comes_first_with_its_number_and_what_to_try(judged):
    text = read(write_report([judged]))[1]
    said = "Better than before training. The held-out margin changed by +0.6700 [+0.5100, +0.8300]."
    assert f"{said} (Paired 95 % interval on 120 rows of 60 prompts.) Next: a lower rate." in text
    assert text.index("Better than") < min(
        text.index(later) for later in ("held-out loss", "Outcome", "Data", "Options")
    )


def test_values_before_training_are_in_tiles_captions_curves_and_the_table(judged):
    page = write_report([judged]).read_text()
    text = read(judged / "report.html")[1]
    assert "before 0 " in text.split("Outcome")[0]
    assert "Held out: 50 % before, 71 % [64, 78] after 300 updates." in text
    assert ["reward margin", "0", "0.67 [0.526, 0.814]", "0.67 [0.51, 0.83]"] in rows_of(page, "Outcome")
    for plot in plots.outcome_curves(read_folder(judged)):
        marks = json.loads(plot.json)["marks"]
        (level,) = [mark["y"] for mark in marks if mark["kind"] == "rule"]
        (held,) = [mark for mark in marks if mark.get("name") == "held out"]
        assert (held["x"][0], held["y"][0]) == (0, level)


def test_the_final_value_alone_has_a_curve_from_before_training(run):
    (run / "metrics.jsonl").write_text('{"step": 300, "loss": 0.4, "train_runtime": 3.0}\n')
    held = read_folder(run).held_out("rewards/margins")
    np.testing.assert_allclose(held.steps, [0, 300])
    np.testing.assert_allclose(held.values, [0, 0.67])
    np.testing.assert_allclose([held.low, held.high], [[0, 0.51], [0, 0.83]])


def test_a_change_within_its_interval_does_not_look_like_a_trend(run):
    write_verdict(run, change=0.001, by=0.03)
    (run / "metrics.jsonl").write_text(
        "".join(line + "\n" for line in (run / "metrics.jsonl").read_text().splitlines() if "eval/" in line)
    )
    figure = json.loads(plots.outcome_curves(read_folder(run))[0].json)
    low, high = figure["y"]["range"]
    assert low < 0.001 - 0.03 < 0.001 + 0.03 < high
    (held,) = [mark for mark in figure["marks"] if mark.get("name") == "held out"]
    assert (max(held["y"]) - min(held["y"])) / (high - low) < 0.02


def test_a_tiny_certain_change_looks_tiny(run):
    write_verdict(run, change=1e-4, by=1e-6)
    low, high = json.loads(plots.outcome_curves(read_folder(run))[0].json)["y"]["range"]
    assert high - low > 0.05


@pytest.mark.parametrize(
    ("values", "least", "share", "expected"),
    [
        ([0.0, 1.0], 0.0, False, (-0.06, 1.06)),
        ([0.0, 1.0], 0.0, True, (-0.02, 1.02)),
        ([0.5, 0.5], 1.0, False, (-0.06, 1.06)),
        ([float("nan")], 1.0, False, (0.0, 1.0)),
        ([2.0], 0.0, False, (0.88, 3.12)),
    ],
)
def test_ranges_of_axes(values, least, share, expected):
    assert fitted_range([np.array(values)], least=least, share=share) == pytest.approx(expected)


def test_options_that_differ_from_the_defaults_are_named(run):
    options = rows_of(write_report([run]).read_text(), "Options")
    assert ["--undesirable-weight", "auto", "1"] in options
    assert ["--eval-fraction", "0.1", "0"] in options
    assert "--beta" not in [row[0] for row in options]


def test_runs_with_other_held_out_rows_are_compared_apart(run, tmp_path):
    same, other = shutil.copytree(run, tmp_path / "same"), shutil.copytree(run, tmp_path / "other")
    change(same, "run.json", data={**run_record()["data"], "dropped": 7})
    (same / "config.yaml").write_text(yaml.safe_dump({**CONFIG, "beta": 0.3, "eval_seed": 0, "seed": 0, "warmup": 0.1}))
    (run / "config.yaml").write_text(yaml.safe_dump({**CONFIG, "seed": 0}))
    (other / "config.yaml").write_text(yaml.safe_dump({**CONFIG, "seed": 1}))
    page = write_report([run, same], tmp_path / "page.html").read_text()
    assert "different held-out rows" not in page
    header, first, second = rows_of(page, "Comparison")
    assert {"--beta", "--warmup", "--eval-seed"} <= set(header)
    assert "--epochs" not in header
    column = {name: (a, b) for name, a, b in zip(header, first, second, strict=True)}
    assert column["reward margin"] == ("0 → 0.67 [0.526, 0.814]",) * 2
    assert column["verdict"] == ("better", "better")
    assert column["rows dropped"] == ("0", "7")
    assert column["time"] == ("7 min", "7 min")
    assert column["peak memory, MB"] == ("812", "812")
    page = write_report([run, same, other], tmp_path / "page.html").read_text()
    assert "These runs have different held-out rows, so they are compared in 2 groups" in page
    groups = page.split('aria-label="Comparison"')[1].split("</section>")[0].split('<h3 class="group">')[1:]
    assert [group.count('<th scope="row"') for group in groups] == [2, 1]


@pytest.mark.parametrize(
    "changes",
    [
        {"fingerprint": "77" * 16},
        {"labels_hash": "77" * 16},
        {"held_out_cache": {"fingerprint": "1"}},
        {"data": {"held_out_desirable": 3}},
    ],
)
def test_what_makes_held_out_rows_others(changes, run, tmp_path):
    other = shutil.copytree(run, tmp_path / "other")
    change(other, "run.json", **changes)
    assert "in 2 groups" in write_report([run, other], tmp_path / "page.html").read_text()


@pytest.mark.parametrize("of_cache", ["3f1c" * 8, "77" * 16], ids=["held out of its cache", "of --eval-cache"])
def test_a_run_that_was_evaluated_again_is_compared_with_others(of_cache, run, tmp_path):
    again = shutil.copytree(run, tmp_path / "again")
    change(run, "evaluation.json", fingerprint="3f1c" * 8)
    change(again, "evaluation.json", fingerprint=of_cache, labels_hash="99ab" * 8, rows_are="held out")
    assert len(rows_of(write_report([run, again], tmp_path / "page.html").read_text(), "Comparison")) == 3


@pytest.mark.parametrize(
    ("options", "record", "headings"),
    [
        ({"seed": 3}, {}, ["seed of the hold-out: none", "seed of the hold-out: 3"]),
        ({"eval_fraction": 0.2}, {}, ["fraction held out: 0.1", "fraction held out: 0.2"]),
        ({"objective": "a=1"}, {}, ["objective: none", "objective: a=1"]),
        ({}, {"labels_hash": "77" * 16}, ["labels: 99ab99ab99ab", "labels: 777777777777"]),
    ],
)
def test_headings_of_groups_say_what_differs(options, record, headings, run, tmp_path):
    other = shutil.copytree(run, tmp_path / "other")
    (other / "config.yaml").write_text(yaml.safe_dump({**CONFIG, **options}))
    change(other, "run.json", **record)
    page = write_report([run, other], tmp_path / "page.html").read_text()
    found = re.findall('<h3 class="group">(.*?)</h3>', page)
    assert found == [f"22 held-out rows of cache 3f1c3f1c3f1c ({heading})" for heading in headings]


def sweep_of(tmp_path, *, better, tied, spread=0.1):
    folder = write_sweep(tmp_path / "sweep", trials=12)
    record = json.loads((folder / "sweep.json").read_text())
    complete = [trial for trial in record["trials"] if trial["state"] == "complete"]
    for place, trial in enumerate(complete):
        value = 0.4 + spread * place / len(complete)
        verdict = {"outcome": "better" if better else "no difference", "by": "loss", "reason": "R", "next": "N"}
        trial.update(value=value, untrained=0.5, verdict=verdict, interval={"low": value - 0.02, "high": value + 0.02})
    best, *others = [trial["number"] for trial in complete]
    record |= {"best": best, "tied": others[:tied], "better": [best] * better}
    (folder / "sweep.json").write_text(json.dumps(record))
    return folder, best


def test_a_sweep_names_its_winner_with_interval_and_ties(tmp_path):
    folder, best = sweep_of(tmp_path, better=True, tied=2)
    page = write_report([folder]).read_text()
    text = read(folder / "report.html")[1]
    said = f"The best trial is better than before training. Trial {best}, held-out loss 0.4 [0.38, 0.42]: R. "
    assert f"{said}On these held-out rows it cannot be told from trials 1 and 2." in text
    assert "What mattered" in text
    assert page.count("<meter") == 4
    assert rows_of(page, "Trials")[1][1:3] == ["0.4 [0.38, 0.42]", "0.5"]
    (level,) = {
        mark["y"]
        for plot in sweep_figures.slices(read_folder(folder))
        for mark in json.loads(plot.json)["marks"]
        if mark["kind"] == "rule"
    }
    assert level == 0.5


@pytest.mark.parametrize(
    ("numbers", "said"),
    [
        ([0], "trial 0"),
        ([0, 1, 2], "trials 0, 1 and 2"),
        ([*range(12)], "trials 0, 1, 2, 3, 4, 5, 6, 7, 8, 9 and 2 more"),
    ],
)
def test_numbers_of_trials_in_words(numbers, said):
    assert numbered("trial", numbers) == said


def test_a_single_parameter_is_not_ranked(tmp_path):
    folder, _ = sweep_of(tmp_path, better=True, tied=0)
    trials = json.loads((folder / "sweep.json").read_text())["trials"]
    for trial in trials:
        trial["params"] = {"objective.helpful": 0.1 * trial["number"]}
    change(folder, "sweep.json", trials=trials, space={}, importance={"objective.helpful": 1.0})
    page = write_report([folder]).read_text()
    assert "<meter" not in page
    assert "What mattered" not in page
    assert "objective.helpful" in page


def test_importance_is_not_drawn_from_noise(tmp_path):
    folder, _ = sweep_of(tmp_path, better=False, tied=10)
    page = write_report([folder]).read_text()
    assert "No trial beats the untrained model." in page
    assert "<meter" not in page
    assert "No trial can be told from the best one on these held-out rows" in page
    small, _ = sweep_of(tmp_path / "small", better=False, tied=0, spread=0.001)
    assert "differ by less than a change that would count" in write_report([small]).read_text()
    assert "<meter" not in (small / "report.html").read_text()


def test_a_best_model_that_is_kept_need_not_be_trained_again(tmp_path):
    folder, best = sweep_of(tmp_path, better=True, tied=0)
    command = f"kto-train --config {folder}/best.yaml --out runs/best"
    assert command in read(write_report([folder]))[1]
    (folder / "best").mkdir()
    (folder / "best" / "run.json").write_text(json.dumps({"trial": best, "fingerprint": "another"}))
    assert command in read(write_report([folder]))[1]
    (folder / "best" / "run.json").write_text(json.dumps({"trial": best, "fingerprint": run_record()["fingerprint"]}))
    text = read(write_report([folder]))[1]
    assert command not in text
    assert f"Its model is {folder}/best , its options are in best.yaml" in text
    (folder / "best.yaml").unlink()
    text = read(write_report([folder]))[1]
    assert "kto-train --config" not in text.replace("kto-train --cache", "")
    assert f"trials/{best:04d}/config.yaml" in text


def test_samples_stand_beside_each_other(run):
    write_samples(run, {"Who?": "I,\n me", "What?": "That"})
    elements, text = read(write_report([run]))
    assert [attrs.get("class") for _, attrs in elements.found].count("sample") == 2
    assert "Who? before training I, me 0 Cut at 37 tokens. after 300 updates I, me 300" in text
    assert "During training after 150 updates I, me 150" in text


def test_damaged_samples_and_suspects_cost_only_themselves(run):
    write_samples(run, {"Who?": "I"})
    with (run / "samples.jsonl").open("a") as file:
        file.write(
            '[1]\n{"step": "x", "prompt_id": 1}\n{"step": 0}\n{"step": 0, "prompt_id": null, "prompt": [1], "tokens"'
        )
    (run / "suspects.csv").write_bytes(b'kind,place\nduplicate,a:1\n\xff,"' + b"x" * 200_000)
    text = read(write_report([run]))[1]
    assert "samples.jsonl has 4 lines truncated or damaged: left out." in text
    assert "suspects.csv cannot be read (" in text
    assert "After 300 updates I" in text or "after 300 updates I" in text


def test_suspects_are_listed_by_kind_with_their_places(run):
    rows = [
        {"kind": "changed most", "place": "b.jsonl:9", "label": "undesirable", "reward": "nan", "completion": ""},
        {
            "kind": "contradicts label",
            "place": "a.jsonl:12",
            "label": "desirable",
            "reward": "-1.5",
            "prompt": "P" * 5000,
            "completion": "w " * 300,
        },
        {
            "kind": "duplicate",
            "place": "a.jsonl:3",
            "label": "desirable",
            "reward": "0.5",
            "completion": "'=c",
            "others": "a.jsonl:4; a.jsonl:5",
        },
    ]
    write_suspects(run, rows + [{"kind": "duplicate", "place": f"d:{i}", "completion": "c"} for i in range(40)])
    page = write_report([run]).read_text()
    text = read(run / "report.html")[1]
    assert (
        text.index("Rows that contradict their label: 1")
        < text.index("Duplicate rows: 25")
        < text.index("Rows that changed most: 1")
    )
    assert "ordered by how far the reward lies on the wrong side of the reference point, z0 of the row's update" in text
    assert "16 are left out here" in text
    found = {row[0]: row[1:3] for row in rows_of(page, "Suspects")}
    assert found["a.jsonl:12"] == ["desirable", "\u22121.5"]
    assert found["b.jsonl:9"] == ["undesirable", "–"]
    assert "P" * 2000 + " … (3,000 more characters)" in text
    assert "Also at a.jsonl:4; a.jsonl:5" in text
    assert "completion =c Also" in text
    assert max(len(found) for found in re.findall(r'<summary dir="auto">(.*?)</summary>', page)) <= 110


def test_groups_have_a_table_each(run):
    groups = [
        {
            "by": "class",
            "group": "desirable",
            "rows": 60,
            "accuracy": 0.9,
            "margin": None,
            "loss": 0.25,
            "accuracy_before": 0.5,
            "accuracy_low": 0.8,
            "accuracy_high": 1.0,
        },
        {"by": "class", "group": "undesirable", "rows": 3, "accuracy": 0.25, "margin": 0.1, "loss": 0.5},
        {"by": "source file", "group": HOSTILE, "rows": 9},
        7,
    ]
    change(run, "evaluation.json", groups=groups)
    rows = rows_of(write_report([run]).read_text(), "Groups")
    assert rows[1] == ["desirable", "60", "50 % → 90 % [80, 100]", "–", "0.25"]
    assert rows[2] == ["undesirable", "3", "25 %", "0.1", "0.5"]
    assert HOSTILE in read(run / "report.html")[1]


def test_a_table_says_why_its_groups_have_more_rows_than_there_are(run):
    groups = [{"by": "class", "group": name, "rows": 100} for name in ("desirable", "undesirable")]
    files = [{"by": "source file", "group": name, "rows": 100} for name in "ab"]
    change(run, "evaluation.json", groups=groups + files)
    said = "A row with votes for and against it is in both classes, so the counts add up to more than the 120 held-out rows."
    assert read(write_report([run]))[1].count("so the counts add up to more than") == 1
    assert said in read(run / "report.html")[1]
    change(run, "evaluation.json", groups=[{**group, "rows": 60} for group in groups])
    assert "counts add up" not in write_report([run]).read_text()


TEXTS = [
    HOSTILE,
    "${alert(1)}`;alert(2)//",
    "a\x00b\x1b[31m\x07",
    "left \u202e right \u2066 end\u2028next",
    "half \ud83d a character",
    "<svg onload=alert(3)><style>*{display:none}</style>",
    "'\"><a href='javascript:alert(4)'>",
    "]]> --> <!-- {% raw %} {# #}",
]


@pytest.mark.parametrize("text", TEXTS, ids=range(len(TEXTS)))
def test_text_of_feedback_is_shown_and_does_nothing(text, run):
    write_samples(run, {text: text})
    kinds = ("contradicts label", "duplicate", "contradiction", "changed most")
    write_suspects(
        run,
        [dict.fromkeys(("place", "label", "prompt", "completion", "others"), text) | {"kind": kind} for kind in kinds],
    )
    (run / "config.yaml").write_text(json.dumps({**CONFIG, "objective": text, "model": text}))
    change(
        run,
        "evaluation.json",
        groups=[{"by": text, "group": text}],
        verdict={"outcome": "better", "reason": text, "next": text},
    )
    elements, _ = read(write_report([run]))
    page = (run / "report.html").read_bytes().decode("utf-8")
    assert not set("\x00\x1b\x07\u202e\u2066\u2028") & set(page)
    tags = [tag for tag, _ in elements.found]
    assert not {"img", "iframe", "a", "svg"} & set(tags)
    assert (tags.count("script"), tags.count("style")) == (3, 1)
    expected = text.encode("unicode_escape").decode() if not text.isprintable() else text
    assert "".join(elements.text).count(expected.split("\\u2028")[0][:12]) >= 12


@pytest.mark.slow
def test_texts_are_cut_and_a_page_without_samples_stays_small(run):
    write_suspects(run, [{"kind": "duplicate", "prompt": "p" * 100_000, "completion": "c" * 100_000}] * 500)
    assert write_report([run]).stat().st_size < 1.5e6
    write_samples(run, {f"{i} " + "p" * 50_000: "c" for i in range(150)})
    elements, text = read(write_report([run]))
    assert [attrs.get("class") for _, attrs in elements.found].count("sample") == 100
    assert "50 more prompts are in samples.jsonl" in text


def test_secrets_in_texts_are_hidden(run):
    write_samples(
        run, {"the key is hf_abcdefghijklmnopqrstuvwxyz0123456789": "hf_abcdefghijklmnopqrstuvwxyz0123456789"}
    )
    assert "hf_abcdef" not in write_report([run]).read_text()


def test_an_evaluation_of_an_older_version_has_bands_of_its_own(tmp_path):
    folder = write_run(tmp_path / "old")
    write_evaluation(folder)
    held = read_folder(folder).held_out("loss")
    assert held.before is None
    assert (held.low[-1], held.high[-1]) == pytest.approx((0.378, 0.446))
    assert np.isnan(held.low[:-1]).all()


def test_trials_that_differ_by_less_than_counts_look_alike(tmp_path):
    folder, _ = sweep_of(tmp_path, better=False, tied=0, spread=0.0001)
    sweep = read_folder(folder)
    plot = sweep_figures.parallel_coordinates(sweep)
    ends = [mark["y"][-1] for mark in json.loads(plot.json)["marks"] if mark["kind"] == "line"]
    assert len(ends) > 2
    assert max(ends) - min(ends) < 0.1
    assert len(set(sweep_figures.shades(sweep).values())) <= 2
