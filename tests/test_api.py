"""The Python API: the same runs as the commands make, from a program."""

import importlib.util
import json
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
import transformers
import yaml
from safetensors.torch import load_file

import offline_kto as kto

ROOT = Path(__file__).resolve().parents[1]
TRL = ROOT / "benchmarks/.venv-trl/bin/python"


@pytest.fixture(autouse=True)
def lines_shown() -> None:
    """Start as a program does: nothing shows lines yet."""


def example(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, ROOT / f"examples/{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def run(cache: Path, tmp_path: Path) -> Any:
    return kto.train(cache, tmp_path / "run", max_steps=2, batch_size=8, save_steps=0, device="cpu")


def test_every_name_is_there() -> None:
    for name in [*kto.__all__, "__version__"]:
        assert name in dir(kto)
        assert getattr(kto, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        _ = kto.trian  # type: ignore[attr-defined]


def test_a_stage_is_a_package_and_a_function() -> None:
    import offline_kto.train.config

    assert offline_kto.train.config.TrainConfig is kto.TrainConfig
    assert callable(kto.train)
    assert callable(kto.precompute)


def test_precompute_returns_the_manifest(base: Path, feedback: Path, tmp_path: Path) -> None:
    found = kto.precompute(str(base), feedback, out=tmp_path / "refs", device="cpu", max_length=256)
    assert found == kto.verify(tmp_path / "refs")
    assert found is not None
    assert found.rows == 20
    assert len(kto.open_cache(str(tmp_path / "refs"))) == 20


def test_a_dry_run_writes_nothing(base: Path, feedback: Path, tmp_path: Path) -> None:
    assert kto.precompute(str(base), feedback, out=tmp_path / "refs", device="cpu", dry_run=True) is None
    assert not (tmp_path / "refs").exists()


def test_the_yaml_names_what_is_not_given(base: Path, feedback: Path, tmp_path: Path) -> None:
    settings = {
        "model": str(base),
        "data": str(feedback),
        "out": str(tmp_path / "refs"),
        "device": "cpu",
        "max_length": 256,
    }
    path = tmp_path / "precompute.yaml"
    path.write_text(yaml.safe_dump(settings))
    kto.precompute(config=path)
    kto.precompute(config=path, out=tmp_path / "other", limit=6)
    assert (kto.verify(tmp_path / "refs").rows, kto.verify(tmp_path / "other").rows) == (20, 6)


def test_train_returns_the_run(run: Any, tmp_path: Path) -> None:
    assert run.path == tmp_path / "run"
    assert run.finished
    assert run.last("loss") == pytest.approx(0.5, abs=0.01)
    assert kto.read(run.path).name == "run"
    assert kto.report(run.path, out=tmp_path / "page.html") == tmp_path / "page.html"
    transformers.AutoModelForCausalLM.from_pretrained(run.path)


def test_an_evaluation_has_the_options_of_the_run(cache: Path, tmp_path: Path) -> None:
    run = kto.train(cache, tmp_path / "run", max_steps=1, beta=0.5, eval_fraction=0.3, save_steps=0, device="cpu")
    (run.path / "evaluation.json").unlink()
    again = kto.train(cache, evaluate_only=run.path, device="cpu")
    assert again.evaluation["beta"] == 0.5
    assert again.evaluation["metrics"]["loss"]["value"] == pytest.approx(
        run.evaluation["metrics"]["loss"]["value"], abs=2e-5
    )
    with pytest.raises(kto.KTOError, match="takes the run's own options; leave beta out"):
        kto.train(cache, evaluate_only=run.path, beta=0.1)
    with pytest.raises(kto.KTOError, match="there is no such folder"):
        kto.train(cache, evaluate_only=tmp_path / "none")


def test_lines_are_shown_unless_silence_is_asked_for(
    cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    logger = logging.getLogger("offline_kto")
    monkeypatch.setattr(logger, "propagate", False)  # pytest's own handler
    options: dict[str, Any] = {"max_steps": 1, "batch_size": 20, "save_steps": 0, "device": "cpu"}
    kto.train(cache, tmp_path / "one", **options)
    assert "step        1/1" in capsys.readouterr().out
    monkeypatch.setattr(logger, "level", logging.ERROR)
    logger.manager._clear_cache()  # type: ignore[attr-defined]
    kto.train(cache, tmp_path / "two", **options)
    assert capsys.readouterr().out == ""


def test_a_program_with_logging_decides_which_lines_it_gets(tmp_path: Path) -> None:
    """Show what docs/python-api.md says: only warnings by default, all lines at the level INFO."""
    script = (
        "import logging, sys\nlogging.basicConfig(format='%(name)s %(message)s')\n"
        "if 'INFO' in sys.argv:\n    logging.getLogger('offline_kto').setLevel('INFO')\n"
        "from offline_kto import api\nfrom offline_kto.kto_core.console import tell, warn\n"
        "with api._shown():\n    tell('a line')\n    warn('a warning')\n"
    )
    said = {}
    for level in ("", "INFO"):
        done = subprocess.run(
            [sys.executable, "-c", script, level], capture_output=True, text=True, check=True, cwd=tmp_path
        )
        assert done.stdout == ""
        said[level] = done.stderr
    assert said[""] == "offline_kto warning     a warning\n"
    assert said["INFO"] == "offline_kto a line\n" + said[""]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lerning_rate": 1e-6}, r"TrainConfig has no option 'lerning_rate'\. Did you mean 'learning_rate'\?"),
        ({"loss": "ktoo"}, r"--loss: got 'ktoo'; choose one of kto, .*Did you mean 'kto'"),
        ({"beta": None}, r"--beta must be a number, got None"),
        ({"beta": "fast"}, r"--beta must be a number, got 'fast'"),
        ({"shuffle": "no"}, r"--shuffle must be true or false"),
        ({"batch_size": 8.5}, r"--batch-size must be a whole number, got 8\.5"),
        ({"batch_size": True}, r"--batch-size must be a whole number, got True"),
        ({"training": [1]}, r"--training must be a table"),
        ({"model": object()}, r"model must be a path or a hub id, got a object"),
        ({"cache": Path("nowhere")}, r"nowhere"),
        ({"cache": ""}, r"--cache is missing"),
    ],
)
def test_what_cannot_be_used_is_refused_as_on_the_command_line(
    cache: Path, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(kto.KTOError, match=message):
        kto.train(**{"cache": cache, "out": tmp_path / "run", **options})
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "call",
    [
        lambda: kto.report(["runs/first"]),  # type: ignore[arg-type]
        lambda: kto.read(None),  # type: ignore[arg-type]
        lambda: kto.open_cache(3),  # type: ignore[arg-type]
        lambda: kto.sweep("refs", space="beta"),  # type: ignore[arg-type]
    ],
)
def test_arguments_of_another_kind_are_refused(call: Any) -> None:
    with pytest.raises(kto.KTOError, match="must be a"):
        call()


@pytest.mark.parametrize(
    ("call", "config"),
    [
        (kto.precompute, kto.PrecomputeConfig()),
        (kto.train, kto.TrainConfig()),
        (kto.sweep, kto.SweepConfig()),
    ],
)
def test_options_as_one_object_are_told_how_to_be_given(call: Any, config: Any) -> None:
    kind = type(config).__name__
    for arguments, options in (((config,), {}), ((), {"config": config})):
        with pytest.raises(kto.KTOError, match=rf"got a {kind}, .*\(\*\*vars\(config\)\)"):
            call(*arguments, **options)
    with pytest.raises(kto.KTOError, match="is missing"):  # as advised
        call(**vars(config))


def test_results_are_shown_in_a_line(cache: Path, run: Any) -> None:
    manifest = kto.verify(cache)
    for found, words in (
        (manifest, ["20 rows", f"fingerprint {manifest.fingerprint[:12]}"]),
        (run, [str(run.path), "finished", "2 updates", "loss 0.", manifest.fingerprint[:12]]),
    ):
        assert len(repr(found)) < 300
        assert all(word in repr(found) for word in words), repr(found)


def test_a_report_of_a_run_that_was_read(run: Any) -> None:
    assert kto.report(run) == run.path / "report.html"


def test_configs_read_text_as_the_command_line_does() -> None:
    config = kto.TrainConfig(cache="refs", out="runs/x", beta="0.1", batch_size="8", lora_targets=["q_proj", "v_proj"])  # type: ignore[arg-type]
    assert config == kto.TrainConfig(
        cache=Path("refs"), out=Path("runs/x"), beta=0.1, batch_size=8, lora_targets="q_proj,v_proj"
    )
    settings = kto.PrecomputeConfig(rating_threshold=4, chat_template_kwargs={"enable_thinking": False})  # type: ignore[arg-type]
    assert (settings.rating_threshold, settings.template_settings) == ("4", {"enable_thinking": False})


def test_what_is_missing_is_named() -> None:
    with pytest.raises(kto.KTOError, match="--data is missing"):
        kto.precompute("model", "")
    with pytest.raises(kto.KTOError, match="--cache is missing"):
        kto.sweep("", {"beta": [0.1]})


def test_a_loop_of_ones_own_equals_train(base: Path, cache: Path, tmp_path: Path) -> None:
    own = example("own_loop").train(str(cache), str(base), batch_size=8, learning_rate=3e-3)
    run = kto.train(
        cache,
        tmp_path / "run",
        batch_size=8,
        learning_rate=3e-3,
        shuffle=False,
        balance=False,
        save_steps=0,
        device="cpu",
    )
    expected = load_file(run.path / "model.safetensors")
    for name, weight in own.state_dict().items():
        torch.testing.assert_close(weight, expected[name], atol=1e-5, rtol=0)


def test_rows_for_trl(cache: Path) -> None:
    found = kto.to_trl(cache, partner=1)
    rows = [row for path in sorted((cache / "train").iterdir()) for row in pq.read_table(path).to_pylist()]
    assert set(found.column_names) == {
        *("prompt_ids", "completion_ids", "KL_completion_ids", "label", "ref_logps", "ref_KL_logps")
    }
    for one, row in zip(found, rows, strict=True):
        assert one["KL_completion_ids"] == row["kl_completion_ids"][1]
        assert one["ref_KL_logps"] == row["ref_kl_logps"][1]
        assert {name: one[name] for name in ("prompt_ids", "completion_ids", "label", "ref_logps")} == {
            name: row[name] for name in ("prompt_ids", "completion_ids", "label", "ref_logps")
        }
    with pytest.raises(kto.KTOError, match="but not number 2"):
        kto.to_trl(cache, partner=2)


@pytest.mark.slow
@pytest.mark.skipif(not TRL.exists(), reason="needs TRL's environment: python benchmarks/environments.py")
def test_trl_trains_from_a_cache_without_its_own_reference_pass(base: Path, cache: Path, tmp_path: Path) -> None:
    """A batch in one pass, where TRL's z0 is that of the whole batch: losses of ten updates are ours."""
    program = (
        "import json, sys\n"
        f"sys.path[:0] = [{str(ROOT / 'examples')!r}, {str(ROOT)!r}]\n"
        "from train_with_trl import make_trainer\n"
        "trainer = make_trainer(*sys.argv[1:4], per_device_train_batch_size=4, max_steps=5, learning_rate=3e-3, beta=0.1,\n"
        "    logging_steps=1, save_strategy='no', report_to='none', use_cpu=True, lr_scheduler_type='constant',\n"
        "    gradient_checkpointing=False, max_length=256, bf16=False, seed=0)\n"
        "trainer.compute_ref_log_probs = None  # a pass over the reference would fail\n"
        "trainer.train()\n"
        "print(json.dumps([log for log in trainer.state.log_history if 'loss' in log]))\n"
    )
    done = subprocess.run(
        [TRL, "-c", program, str(cache), str(base), str(tmp_path / "trl")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    theirs = json.loads(done.stdout.splitlines()[-1])
    run = kto.train(
        cache,
        tmp_path / "run",
        batch_size=4,
        max_steps=5,
        learning_rate=3e-3,
        shuffle=False,
        balance=False,
        device="cpu",
    )
    for one, other in zip(theirs, run.records, strict=False):
        assert one["loss"] == pytest.approx(other["loss"], abs=2e-5)
        assert one["kl"] == pytest.approx(other["kl"], abs=2e-3)


@pytest.mark.slow
def test_a_script_without_a_guard_sweeps(cache: Path, tmp_path: Path) -> None:
    """Worker processes must not run the script again."""
    script = tmp_path / "script.py"
    script.write_text(
        "import sys\nprint('once')\nimport offline_kto as kto\n"
        f"found = kto.sweep({str(cache)!r}, {{'beta': [0.05, 0.1]}}, {str(tmp_path / 'sweep')!r}, search='grid', workers=2,\n"
        "    train={'max_steps': 1, 'batch_size': 8, 'eval_fraction': 0.3, 'device': 'cpu'})\n"
        "print('trials', len(found.complete), found.best.params)\n"
    )
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("once") == 1
    assert "trials 2 {'beta': " in done.stdout
