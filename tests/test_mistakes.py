"""A user's mistake gives exit code 1 and one message: where, what was found, what to do. Never a traceback."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import forks
import pytest
from click.testing import CliRunner, Result
from feedback_files import chat_rows, write_rows
from models import save_tiny

from offline_kto.precompute.cli import cache as kto_cache
from offline_kto.precompute.cli import precompute as kto_precompute
from offline_kto.train.cli import train as kto_train


def run(command: object, *arguments: object) -> Result:
    return CliRunner().invoke(command, [str(a) for a in arguments])  # type: ignore[arg-type]


def assert_refused(result: Result, *words: str) -> str:
    """Exit 1, one message on stderr that holds the words."""
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise AssertionError("a traceback") from result.exception
    assert result.exit_code == 1, result.output
    message = result.stderr
    assert message.startswith("Error: ")
    assert message.count("Error:") == 1
    assert "Traceback" not in result.output
    for word in words:
        assert word in message
    return message


@pytest.fixture
def precompute(base: Path, tmp_path: Path) -> Callable[..., Result]:
    """`kto-precompute` on some feedback."""

    def run_on(data: object, *arguments: object) -> Result:
        return run(kto_precompute, "--model", base, "--data", data, "--out", tmp_path / "refs", *arguments)

    return run_on


GOOD = json.dumps(chat_rows(1)[0])


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"prompt": "a", "completion": "b", "label": null}', ["f.jsonl:2", "unrated: 1"]),
        ('{"prompt": "a", "completion": "b", "label": 2}', ["f.jsonl:2", "2"]),
        ('{"prompt": "a", "completion": "b", "label": "maybe"}', ["f.jsonl:2", "maybe"]),
        ('{"prompt": "a", "completion": "b", "label": {"is": true}}', ["f.jsonl:2"]),
        ('{"prompt": "a", "completion": "b"}', ["f.jsonl:2", "unrated: 1"]),
        ('{"prompt": "a", "label": true}', ["f.jsonl:2", "completion"]),
        ('{"completion": "a", "label": true}', ["f.jsonl:2", "prompt"]),
        ('{"prompt": "a", "completion": "", "label": true}', ["f.jsonl:2", "empty answer: 1"]),
        ('{"prompt": "a", "completion": "b", "rating": 4}', ["f.jsonl:2", "--rating-threshold"]),
        ('{"prompt": "a", "completion": "b", "la', ["f.jsonl:2"]),
        ("[1, 2]", ["f.jsonl:2"]),
    ],
)
def test_a_bad_row_is_named_with_file_and_line(
    line: str, words: list[str], tmp_path: Path, precompute: Callable[..., Result]
) -> None:
    data = tmp_path / "f.jsonl"
    data.write_text(f"{GOOD}\n{line}\n", encoding="utf-8")
    assert_refused(precompute(data), *words)
    assert not (tmp_path / "refs").exists()


def test_wrong_encoding(tmp_path: Path, precompute: Callable[..., Result]) -> None:
    data = tmp_path / "f.jsonl"
    data.write_bytes(GOOD.encode() + b'\n{"prompt": "caf\xe9", "completion": "b", "label": true}\n')
    assert_refused(precompute(data), "f.jsonl:2", "UTF-8")


def test_files_that_hold_no_feedback(tmp_path: Path, precompute: Callable[..., Result], cache: Path) -> None:
    empty = tmp_path / "empty.jsonl"
    empty.touch()
    folder = tmp_path / "folder"
    folder.mkdir()
    assert_refused(precompute(empty), "empty.jsonl")
    assert_refused(precompute(folder), "folder")
    assert_refused(precompute(tmp_path / "none.jsonl"), "none.jsonl")
    assert_refused(precompute(cache), "reference cache")
    assert_refused(precompute("no-such-owner/no-such-data"), "no-such-owner/no-such-data")


def test_too_little_feedback(tmp_path: Path, precompute: Callable[..., Result]) -> None:
    one = write_rows(tmp_path / "one.jsonl", chat_rows(1))
    assert_refused(precompute(one), "two rows")
    same = write_rows(tmp_path / "same.jsonl", [{"prompt": "x", "completion": str(i), "label": True} for i in range(3)])
    assert_refused(precompute(same), "every row is desirable", "--one-class")
    assert_refused(precompute(same, "--one-class"), "one prompt")
    assert_refused(precompute(one, "--max-length", 4), "--max-length")


def test_models_that_are_none(tmp_path: Path, feedback: Path) -> None:
    def on(model: object, *more: object) -> Result:
        return run(kto_precompute, "--model", model, "--data", feedback, "--out", tmp_path / "refs", *more)

    assert_refused(on(tmp_path / "none"), "none")
    assert_refused(on("no-such-owner/no-such-model"), "no-such-owner/no-such-model")
    empty = tmp_path / "empty"
    empty.mkdir()
    assert_refused(on(empty), "config.json")
    pickled = save_tiny(tmp_path / "pickled")
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    assert_refused(on(pickled), "safetensors", "pickle")
    cut = save_tiny(tmp_path / "cut")
    whole = (cut / "model.safetensors").read_bytes()
    (cut / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    assert_refused(on(cut), "safetensors")
    broken = save_tiny(tmp_path / "broken")
    (broken / "tokenizer.json").write_text("{")
    assert_refused(on(broken), "tokenizer")
    shapeless = save_tiny(tmp_path / "shapeless")
    (shapeless / "config.json").write_text('{"model_type": "nothing-known"}')
    assert_refused(on(shapeless), "shapeless")
    assert_refused(on(save_tiny(tmp_path / "fine"), "--adapter", empty), "adapter_config.json")
    assert_refused(on(tmp_path / "fine", "--backend", "vllm"), "vllm")


@pytest.mark.parametrize(
    "options",
    [
        ["--max-length", "0"],
        ["--kl-partners", "0"],
        ["--rows-per-shard", "0"],
        ["--limit", "0"],
        ["--pairing", "rotate", "--pairing-block", "1"],
        ["--kl-partners", "30"],
        ["--rating-threshold", "high"],
        ["--device", "cuda:99"],
        ["--device", "abacus"],
    ],
)
def test_values_that_make_no_sense(options: list[str], feedback: Path, precompute: Callable[..., Result]) -> None:
    assert_refused(precompute(feedback, *options))


def test_an_out_whose_name_is_not_text(tmp_path: Path, base: Path, feedback: Path) -> None:
    out = tmp_path / os.fsdecode(b"refs\xff")
    assert_refused(
        run(kto_precompute, "--model", base, "--data", feedback, "--out", out), "not UTF-8", "another folder"
    )
    assert not out.exists()


def test_an_out_that_is_a_file_or_holds_something_else(tmp_path: Path, base: Path, feedback: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    assert_refused(run(kto_precompute, "--model", base, "--data", feedback, "--out", file), "file")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/notes.txt").touch()
    assert_refused(run(kto_precompute, "--model", base, "--data", feedback, "--out", tmp_path / "full"), "notes.txt")


def test_a_cache_that_is_not_one(tmp_path: Path, cache: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    for command in (["verify"], ["info"], ["head"]):
        assert_refused(run(kto_cache, *command, empty), "not a reference cache", "kto-precompute")
    assert_refused(run(kto_train, "--cache", empty, "--out", tmp_path / "run"), "not a reference cache")
    assert_refused(run(kto_train, "--cache", tmp_path / "none", "--out", tmp_path / "run"), "no such folder")
    file = tmp_path / "file.json"
    file.write_text("{}")
    assert_refused(run(kto_train, "--cache", file, "--out", tmp_path / "run"), "file.json")
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "manifest.json").write_text("{")
    assert_refused(run(kto_train, "--cache", broken, "--out", tmp_path / "run"), "manifest.json")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("learning_rat: 1e-6", ["learning_rat", "Did you mean 'learning_rate'"]),
        ("batch_sise: 4", ["Did you mean 'batch_size'"]),
        ("beta: fast", ["beta", "a number", "fast"]),
        ("batch_size: 1.5", ["batch_size", "a whole number"]),
        ("shuffle: 'no'", ["shuffle", "true or false"]),
        ("beta:", ["beta", "no value"]),
        ("loss: kot", ["loss", "kto"]),
        ("- beta", ["list"]),
        ("beta: [", ["YAML"]),
        ("beta: 0.1\nbeta: 0.2", ["twice"]),
        ("training: {adam_beta: 1}", ["adam_beta", "Did you mean"]),
        ("training: {max_grad_norm: '1'}", ["max_grad_norm must be a number", "'1'"]),
        ("training: {save_total_limit: 1.5}", ["save_total_limit must be a whole number", "1.5"]),
        ("training: {full_determinism: 'no'}", ["full_determinism must be true or false", "'no'"]),
        ("training: {label_smoothing_factor: 0.1}", ["label_smoothing_factor has no effect"]),
        ("training: {use_liger_kernel: true}", ["liger-kernel is not installed"]),
        ("training: {eval_strategy: epoch}", ["training: ", "eval_strategy", "eval_dataset"]),
        ("training: {save_strategy: best}", ["training: ", "metric_for_best_model"]),
        ("training:", ["training: has no value. Give one, or delete the line."]),
        ("training: {optim: adamw_torch_4bit}", ["optim", "adamw_torch_4bit", "torchao"]),
        ("max_tokens: plenty", ["--max-tokens", "auto", "plenty"]),
        ("max_tokens: 1.5", ["max_tokens", "1.5"]),
        ("max_tokens: 0", ["--max-tokens", "at least 1"]),
        ("resume: true", ["--resume"]),
    ],
)
def test_a_yaml_that_cannot_be_used(text: str, words: list[str], tmp_path: Path, cache: Path) -> None:
    config = tmp_path / "c.yaml"
    config.write_text(text)
    result = run(kto_train, "--cache", cache, "--out", tmp_path / "run", "--config", config)
    assert_refused(result, *words)


@pytest.mark.parametrize(
    "options",
    [
        ["--beta", "0"],
        ["--beta", "nan"],
        ["--learning-rate", "-1"],
        ["--batch-size", "0"],
        ["--desirable-weight", "-1"],
        ["--eval-fraction", "1"],
        ["--eval-fraction", "0.000001"],
        ["--max-length", "5000"],
        ["--max-length", "2"],
        ["--epochs", "0"],
        ["--seed", "99999999999999"],
        ["--desirable-weight", "0", "--undesirable-weight", "0"],
        ["--model", "no-such-model-here/x"],
        ["--report-to", "carrier-pigeon"],
    ],
)
def test_training_options_that_make_no_sense(options: list[str], tmp_path: Path, cache: Path) -> None:
    assert_refused(run(kto_train, "--cache", cache, "--out", tmp_path / "run", "--device", "cpu", *options))


def test_usage_errors_exit_with_2(tmp_path: Path, base: Path) -> None:
    for result in (
        run(kto_precompute, "--model", base),
        run(kto_precompute, "--data", "x"),
        run(kto_train),
        run(kto_train, "--cache", tmp_path, "--learning-rat", "1"),
        run(kto_train, "--cache", tmp_path, "--beta", "fast"),
        run(kto_train, "--cache", tmp_path, "--desirable-weight", "heavy"),
        run(kto_precompute, "--model", base, "--data", "x", "--pairing", "random"),
        run(kto_precompute, "--model", base, "--data", "x", "--data", "y"),
    ):
        assert result.exit_code == 2
        assert "Traceback" not in result.output


def test_our_own_mistakes_keep_their_traceback(
    tmp_path: Path, base: Path, feedback: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import offline_kto.precompute.pipeline

    def broken(*arguments: object, **options: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(offline_kto.precompute.pipeline, "make_plan", broken)
    result = run(kto_precompute, "--model", base, "--data", feedback, "--out", tmp_path / "refs")
    assert isinstance(result.exception, ZeroDivisionError)


def test_a_real_process_prints_one_message(tmp_path: Path, base: Path) -> None:
    data = tmp_path / "f.jsonl"
    data.write_text(GOOD + '\n{"prompt": "a", "completion": "b", "label": "maybe"}\n')
    program = "from offline_kto.precompute.cli import precompute; precompute()"
    done = forks.run(program, "--model", base, "--data", data, "--out", tmp_path / "refs")
    assert done.returncode == 1
    assert [line.split()[0] for line in done.stdout.splitlines()] == ["starting", "reference", "attention"]
    assert len(done.stderr.strip().splitlines()) == 1
    assert done.stderr.startswith("Error: ")
    assert "f.jsonl:2" in done.stderr
