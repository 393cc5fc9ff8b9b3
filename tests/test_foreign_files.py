"""Run folders, sweep folders, caches and adapters from others: with links, pipes, endless files and names that drive terminals."""

import csv
import io
import json
import os
import re
import shutil
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from click.testing import CliRunner
from huggingface_hub import ModelCard
from report_samples import records, write_records, write_run, write_sweep

from offline_kto.kto_core.cache.manifest import read_manifest
from offline_kto.kto_core.console import tell
from offline_kto.kto_core.durable_files import remove_tree, write_text
from offline_kto.kto_core.errors import CacheError, ConfigError, ModelError, TrainingError
from offline_kto.kto_core.foreign_files import read_foreign
from offline_kto.kto_core.lock import is_held
from offline_kto.kto_core.models.folders import find_folder
from offline_kto.precompute.inspect_cache import info
from offline_kto.train import run_files
from offline_kto.train.cli import report, train
from offline_kto.train.config import TrainConfig
from offline_kto.train.publish.model_card import CardContent, write_card
from offline_kto.train.report.report import write_report
from offline_kto.train.run import callbacks as watching
from offline_kto.train.run.callbacks import MetricsFile, read_metrics
from offline_kto.train.run.train_run import train as run_training
from offline_kto.train.run_files import holds_word, read_rewards, read_run_record
from offline_kto.train.run_records import RunRecord
from offline_kto.train.sweep.results import _cell, _read
from offline_kto.train.sweep.sweep import _database

PRECIOUS = "users: [{name: admin, user: {token: KUBE-SECRET, name: KUBE-SECRET}}]\n"
OVERRIDE = "\x1b]0;owned\x07\x1b[2J\u202egnp.exe\x00"
LIMIT = 1 << 20


@pytest.fixture(autouse=True)
def in_time() -> Iterator[None]:
    """Whoever opens a pipe waits for ever."""

    def late(*_: object) -> None:
        raise TimeoutError("it waits for a pipe")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(120)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture
def precious(tmp_path: Path) -> Path:
    path = tmp_path / "kubeconfig"
    path.write_text(PRECIOUS)
    return path


FILES = ("config.yaml", "run.json", "metrics.jsonl", "evaluation.json", "rewards.parquet", "sweep.json", "sweep.yaml")


def _made(tmp_path: Path, name: str) -> Path:
    folder = tmp_path / "from" / "them"
    made: Path = write_sweep(folder, trials=2) if name.startswith("sweep") else write_run(folder, steps=20)
    return made


class TestReports:
    @pytest.mark.parametrize("name", FILES)
    @pytest.mark.parametrize(
        "kind", ["link", "relative link", "pipe", "pipe behind a link", "socket", "folder", "endless"]
    )
    def test_what_is_no_file_of_the_folder_becomes_a_note(
        self, tmp_path: Path, precious: Path, name: str, kind: str
    ) -> None:
        folder = _made(tmp_path, name)
        path = folder / name
        path.unlink(missing_ok=True)
        if kind == "link":
            path.symlink_to(precious)
        elif kind == "relative link":
            path.symlink_to("../../kubeconfig")
        elif kind == "pipe":
            os.mkfifo(path)
        elif kind == "pipe behind a link":
            os.mkfifo(folder / "pipe")
            path.symlink_to("pipe")
        elif kind == "socket":
            os.mknod(path, 0o140600)
        elif kind == "folder":
            path.mkdir()
        else:
            with path.open("wb") as file:
                file.truncate(1 << 36)
        page = write_report([folder]).read_text()
        assert "KUBE-SECRET" not in page
        assert f"{name} cannot be read" in page.split("Unreadable content")[1]

    def test_links_inside_the_folder_and_of_the_hub_s_cache_are_followed(self, tmp_path: Path) -> None:
        run = write_run(tmp_path / "hub" / "models--me--run" / "snapshots" / "1a2b")
        blobs = run.parent.parent / "blobs"
        blobs.mkdir()
        for number, path in enumerate(sorted(run.iterdir())):
            path.rename(blobs / str(number))
            path.symlink_to(f"../../blobs/{number}")
        (tmp_path / "link").symlink_to(run)  # a run folder on another disk
        page = write_report([tmp_path / "link"], tmp_path / "page.html").read_text()
        assert "Unreadable content" not in page
        assert "Held-out accuracy 71 %" in page
        (run / "again.yaml").symlink_to("config.yaml")
        assert read_foreign(run / "again.yaml", most=LIMIT) == (run / "config.yaml").read_bytes()

    def test_a_trial_s_folder_that_leads_elsewhere_is_no_trial(self, tmp_path: Path) -> None:
        folder = write_sweep(tmp_path / "sweep", trials=4)
        private = tmp_path / "private"
        private.mkdir()
        (private / "config.yaml").write_text("name: KUBE-SECRET\nbeta: 0.1\n")
        write_records(private, records(10))
        shutil.rmtree(folder / "trials" / "0001")
        (folder / "trials" / "0001").symlink_to(private)
        from offline_kto.train.report.folders import read_folder

        found = read_folder(folder)
        assert [trial.run is None for trial in found.trials] == [False, True, False, False]

    def test_a_page_is_written_beside_a_link_and_not_through_it(self, tmp_path: Path, precious: Path) -> None:
        run = write_run(tmp_path / "run")
        (run / "report.html").symlink_to(precious)
        (run / f".report.html.{os.getpid()}.tmp").symlink_to(precious)
        write_report([run])
        assert precious.read_text() == PRECIOUS
        assert not (run / "report.html").is_symlink()

    def test_names_from_others_drive_no_terminal_and_no_page(self, tmp_path: Path) -> None:
        run = write_run(tmp_path / "run", steps=20).rename(tmp_path / f"run{OVERRIDE[:-1]}\udcff")
        record = json.loads((run / "run.json").read_text())
        record["data"]["files"] = [OVERRIDE, "\ud800"]
        (run / "run.json").write_text(
            json.dumps({**record, "command": OVERRIDE, "device": OVERRIDE, "warnings": [OVERRIDE]})
        )
        (run / "config.yaml").write_text(yaml.safe_dump({"model": OVERRIDE[:-1]}))
        said = CliRunner().invoke(report, [str(run)])
        assert said.exit_code == 0
        assert said.output.count("\n") == 1
        assert said.output.strip().isprintable()
        page = (run / "report.html").read_text().split("<style>")[0] + (run / "report.html").read_text().split(
            "</style>"
        )[1]
        assert not set("\x1b\x07\x00\u202e") & set(page.split("<script")[0])
        assert "\\u202egnp.exe" in page

    def test_a_packed_bomb_of_texts_is_read_without_unpacking_it(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        rows = 200_000  # of a megabyte each, were they made: 200 GB
        split = pa.DictionaryArray.from_arrays(pa.array([0] * rows, pa.int32()), pa.array(["x" * LIMIT]))
        table = pa.table({"split": split, "label": [True] * rows, "logratio": pa.array([1.0] * rows, pa.float32())})
        pq.write_table(table, tmp_path / "rewards.parquet", compression="zstd", use_dictionary=["split"])
        found = read_rewards(tmp_path, ["split", "label", "logratio"])
        assert holds_word(found["split"], "train").sum() == 0
        assert len(found) == rows
        monkeypatch.setattr(run_files, "MOST_REWARDS", rows - 1)
        with pytest.raises(ValueError, match="200,000 rows"):
            read_rewards(tmp_path, ["split"])


class TestReaders:
    def test_run_json_and_sweep_json(self, tmp_path: Path, precious: Path) -> None:
        for make in (lambda path: path.symlink_to(precious), os.mkfifo):
            make(tmp_path / "run.json")
            with pytest.raises(ConfigError, match=r"run\.json: cannot be read"):
                read_run_record(tmp_path)
            assert _read(tmp_path / "run.json") == {}
            (tmp_path / "run.json").unlink()

    def test_records(self, tmp_path: Path) -> None:
        os.mkfifo(tmp_path / "metrics.jsonl")
        with pytest.raises(TrainingError, match="not a regular file"):
            read_metrics(tmp_path / "metrics.jsonl")

    def test_the_options_of_a_run_that_is_evaluated(self, tmp_path: Path, precious: Path) -> None:
        run = write_run(tmp_path / "run")
        (run / "config.yaml").unlink()
        (run / "config.yaml").symlink_to(precious)
        said = CliRunner().invoke(train, ["--cache", "refs", "--evaluate-only", str(run)])
        assert said.exit_code == 1
        assert "config.yaml: cannot be read: it is a link that leads out of its folder" in said.output
        assert "KUBE" not in said.output

    def test_options_of_the_user_s_own_may_come_through_a_pipe(self, tmp_path: Path) -> None:
        from offline_kto.kto_core.yaml_files import read_yaml

        read, write = os.pipe()
        os.write(write, b"beta: 0.2\n")
        os.close(write)
        assert read_yaml(Path(f"/dev/fd/{read}")) == {"beta": 0.2}
        (tmp_path / "mine.yaml").symlink_to(tmp_path / "dots" / "kto.yaml")
        (tmp_path / "dots").mkdir()
        (tmp_path / "dots" / "kto.yaml").write_text("beta: 0.3\n")
        assert read_yaml(tmp_path / "mine.yaml") == {"beta": 0.3}

    def test_a_lock(self, tmp_path: Path) -> None:
        os.mkfifo(tmp_path / ".lock")
        assert not is_held(tmp_path)

    def test_a_cache(self, cache: Path, tmp_path: Path, precious: Path) -> None:
        folder = shutil.copytree(cache, tmp_path / "refs")
        content = (folder / "manifest.json").read_bytes()
        (folder / "manifest.json").unlink()
        (folder / "manifest.json").symlink_to(precious)
        with pytest.raises(CacheError, match="leads out of its folder"):
            read_manifest(folder)
        (folder / "manifest.json").unlink()
        with (folder / "manifest.json").open("wb") as file:
            file.truncate(1 << 36)
        with pytest.raises(CacheError, match="bytes, more than the limit of"):
            info(folder)
        (folder / "manifest.json").unlink()
        (folder / "manifest.json").write_bytes(content)
        shard = next((folder / "train").glob("*.parquet"))
        shard.unlink()
        os.mkfifo(shard)
        said = CliRunner().invoke(train, ["--cache", str(folder), "--out", str(tmp_path / "run"), "--device", "cpu"])
        assert said.exit_code == 1
        assert "not a regular file" in said.output

    def test_a_model_or_adapter(self, base: Path, tmp_path: Path) -> None:
        model = shutil.copytree(base, tmp_path / "model")
        assert find_folder(str(model), revision=None) == (model, None)
        (model / "nowhere").symlink_to("gone")
        (tmp_path / "snapshot").mkdir()
        for path in model.iterdir():
            (tmp_path / "snapshot" / path.name).symlink_to(path)  # as the hub's cache has it
        assert find_folder(str(tmp_path / "snapshot"), revision=None)[0] == tmp_path / "snapshot"
        os.mkfifo(model / "adapter_config.json")
        with pytest.raises(ModelError, match=r"adapter_config.json is neither a file nor a folder"):
            find_folder(str(model), revision=None, what="adapter")


class TestWriters:
    def test_records_are_not_appended_to_what_a_link_leads_to(self, tmp_path: Path, precious: Path) -> None:
        path = tmp_path / "metrics.jsonl"
        state = SimpleNamespace(global_step=0)
        for target in (precious, tmp_path / "nothing yet"):
            path.symlink_to(target)
            file = MetricsFile(path)
            file.on_train_begin(None, state, None)
            assert not path.is_symlink()
            file.on_log(None, SimpleNamespace(global_step=1), None, {"loss": 0.5})
            assert watching.read_metrics(path) == [{"step": 1, "loss": 0.5}]
            path.unlink()
        path.symlink_to(precious)  # since then
        with pytest.raises(OSError, match="symbolic links"):
            MetricsFile(path).on_log(None, state, None, {"loss": 0.5})
        assert precious.read_text() == PRECIOUS
        assert not (tmp_path / "nothing yet").exists()

    def test_a_folder_is_removed_and_of_a_link_the_link(self, tmp_path: Path, precious: Path) -> None:
        (tmp_path / "home").mkdir()
        precious.rename(tmp_path / "home" / "precious")
        (tmp_path / "model").symlink_to("home")
        remove_tree(tmp_path / "model")
        remove_tree(tmp_path / "none")
        assert (tmp_path / "home" / "precious").read_text() == PRECIOUS
        assert not (tmp_path / "model").is_symlink()

    def test_a_temporary_file_that_is_a_link_is_not_written_through(self, tmp_path: Path, precious: Path) -> None:
        (tmp_path / f".x.json.{os.getpid()}.tmp").symlink_to(precious)
        write_text(tmp_path / "x.json", "{}")
        assert precious.read_text() == PRECIOUS
        assert (tmp_path / "x.json").read_text() == "{}"

    def test_the_study_of_a_sweep(self, tmp_path: Path, precious: Path) -> None:
        (tmp_path / "study.db").symlink_to(precious)
        with pytest.raises(ConfigError, match="not a regular file"):
            _database(tmp_path)

    def test_a_run_from_somebody_else_is_resumed_without_touching_anything_outside(
        self, cache: Path, tmp_path: Path, precious: Path
    ) -> None:
        config = TrainConfig(
            cache=cache, out=tmp_path / "run", batch_size=8, max_steps=1, save_steps=1, device="cpu", eval_fraction=0.3
        )
        out = run_training(config)
        home = tmp_path / "home"
        home.mkdir()
        (home / "precious").write_text(PRECIOUS)
        for name in ("README.md", "report.html", "evaluation.json", "rewards.parquet", "config.json", "tokenizer.json"):
            (out / name).unlink()
            (out / name).symlink_to(precious)
        (out / "_unfinished").symlink_to(home)
        (out / "checkpoint-2").symlink_to(home)
        for name in ("config.yaml", "run.json", "metrics.jsonl", "README.md"):
            (out / f".{name}.{os.getpid()}.tmp").symlink_to(precious)
        (out / "checkpoint-1").rename(tmp_path / "elsewhere")
        (out / "checkpoint-1").symlink_to(tmp_path / "elsewhere")  # the user's own: another disk
        (out / "checkpoint-2").unlink()
        run_training(replace(config, max_steps=2, resume=True))
        assert precious.read_text() == PRECIOUS
        assert [path.name for path in home.iterdir()] == ["precious"]
        assert (home / "precious").read_text() == PRECIOUS
        assert "library_name: transformers" in (out / "README.md").read_text()
        assert [record["step"] for record in read_metrics(out / "metrics.jsonl") if "loss" in record] == [1, 2]
        os.mkfifo(out / "checkpoint-2" / "pipe")
        with pytest.raises(ConfigError, match="pipe is neither a file nor a folder"):
            run_training(replace(config, max_steps=3, resume=True))


class TestNames:
    @pytest.mark.parametrize("local", [True, False])
    def test_a_card_shows_names_letter_by_letter(self, tmp_path: Path, local: bool) -> None:
        evil = "x` <img src=x onerror=alert(1)> ``` **b** [a](http://b)\n---\nlicense: mit\x1b[31m\u202e"
        manifest: Any = SimpleNamespace(
            reference={"id": evil},
            fingerprint="f",
            data={"desirable": 1, "undesirable": 2, "files": [{"name": evil}], "labels_hash": "l"},
            tokenization={},
        )
        files: Any = SimpleNamespace(name=evil, adapter=evil, folder=tmp_path / evil[:5], is_local=local)
        path = tmp_path / "README.md"
        (tmp_path / "adapter_config.json").touch()  # the usage names the base model
        config = TrainConfig(cache=evil, report_to="a\nb```", lora_rank=1, lora_targets=evil)
        record: RunRecord = {"data": {"desirable": 1}, "versions": {"torch": evil}, "precision": evil}
        write_card(path, CardContent(evil, config, manifest, files, record, []))
        text = path.read_text()
        assert not set("\x1b\u202e") & set(text)
        lines = text.splitlines()
        assert lines.count("---") == 2
        front = yaml.safe_load(text.split("---\n")[1])
        assert set(front) == {"library_name", "pipeline_tag", "tags"}  # what is no hub id is no base model there
        assert ModelCard.load(path).data.to_dict() == front
        outside = re.sub(r"(`+)(?!`).*?(?<!`)\1(?!`)", "", text.split("---\n", 2)[2], flags=re.DOTALL)
        assert not re.search(r"(?<!\\)[<\[*`]", outside), outside

    def test_plain_names_stay_as_they_are_in_a_card(self, tmp_path: Path) -> None:
        manifest: Any = SimpleNamespace(
            reference={"id": "org/my_model-1"},
            fingerprint="f",
            data={"desirable": 1, "undesirable": 2, "labels_hash": "l"},
            tokenization={},
        )
        files: Any = SimpleNamespace(name="org/my_model-1", adapter=None, folder=tmp_path, is_local=False)
        config = TrainConfig(cache=Path("refs"))
        write_card(tmp_path / "c", CardContent("my_run-1, trial 3", config, manifest, files, {}, []))
        text = (tmp_path / "c").read_text()
        assert "\n# my_run-1, trial 3\n" in text
        assert "from `org/my_model-1`, against reference scores of `org/my_model-1`." in text
        assert "\n```\nkto-train --cache refs\n```\n" in text

    def test_a_line_drives_no_terminal(self, capsys: pytest.CaptureFixture[str]) -> None:
        tell(f"wrote       {OVERRIDE}\n s3://me:CRET@b")
        assert capsys.readouterr().out == (
            "wrote       \\x1b]0;owned\\x07\\x1b[2J\\u202egnp.exe\\x00\\n s3://me:***@b\n"
        )

    @pytest.mark.parametrize(
        "start", ["=", "+", "-", "@", "\t=", "\r=", "  =", "\uff1d", "\uff0b", "x; =", "x;@", "\n-"]
    )
    def test_no_cell_is_a_formula(self, start: str) -> None:
        text = f"{start}cmd|' /C calc'!A0"
        table = io.StringIO()
        csv.writer(table).writerow([_cell(text)])
        for delimiter in ",;":  # as spreadsheets of other countries part cells
            for row in csv.reader(io.StringIO(table.getvalue()), delimiter=delimiter):
                assert not [cell for cell in row if re.match(r"[\s]*[=+\-@\uff1d\uff0b\uff0d\uff20]", cell)]
        assert "cmd|" in table.getvalue()

    @pytest.mark.parametrize("value", [-0.5, 3, None, True, -1e-7, "-1e-6", "+3", "kto", "all-linear", "a = b", ""])
    def test_numbers_and_words_stay_as_they_are(self, value: object) -> None:
        assert _cell(value) == value
