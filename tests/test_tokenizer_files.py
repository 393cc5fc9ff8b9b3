"""Tokenizers and templates as their files, and the user, say; in the cache, in training, and in what is saved."""

import json
import logging
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path
from shutil import copytree
from typing import Any

import pyarrow.parquet as pq
import pytest
from feedback_files import chat_rows, write_rows
from models import CHAT_TEMPLATE, save_tiny, tiny_tokenizer
from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import offline_kto.precompute.parallel_reading
from offline_kto.kto_core.cache.manifest import read_manifest
from offline_kto.kto_core.errors import ConfigError, KTOError
from offline_kto.kto_core.models.tokenizer_files import load_tokenizer
from offline_kto.kto_core.options import parse_settings
from offline_kto.precompute.config import PrecomputeConfig
from offline_kto.precompute.run import precompute as score
from offline_kto.train.config import TrainConfig
from offline_kto.train.run.evaluate_run import evaluate_run
from offline_kto.train.run.train_run import train


def set_class(folder: Path, name: str) -> None:
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text())
    config.pop("backend", None)
    path.write_text(json.dumps({**config, "tokenizer_class": name}))


def ids_of(refs: Path) -> list[list[int]]:
    return [
        [*row["prompt_ids"], *row["completion_ids"]]
        for path in sorted(refs.glob("train/*.parquet"))
        for row in pq.read_table(path).to_pylist()
    ]


def texts_of(refs: Path, folder: Path) -> list[str]:
    """Return what the file tokenizer.json alone makes of the cache's ids."""
    filed = Tokenizer.from_file(str(folder / "tokenizer.json"))
    return [filed.decode(ids, skip_special_tokens=False) for ids in ids_of(refs)]


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "f.jsonl", chat_rows(8))


def config_of(folder: Path, rows: Path, **options: Any) -> PrecomputeConfig:
    values = {"out": rows.parent / "refs", "max_length": 256, **options}
    return PrecomputeConfig(model=str(folder), data=str(rows), **values)


def training(refs: Path, out: Path, **options: Any) -> TrainConfig:
    return TrainConfig(cache=refs, out=out, max_steps=1, batch_size=4, **options)


@pytest.mark.parametrize("name", ["LlamaTokenizerFast", "LlamaTokenizer"])
def test_a_byte_level_file_under_another_class_is_read_as_it_is(
    name: str, tmp_path: Path, rows: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """DeepSeek's: transformers' class keeps the vocabulary, and every space is gone."""
    folder = save_tiny(tmp_path / "m")
    expected = save_tiny(tmp_path / "right")
    set_class(folder, name)
    refs = tmp_path / "refs"
    score(config_of(folder, rows))
    own = AutoTokenizer.from_pretrained(folder)  # transformers 5.24 ignores the class, so that nothing is different
    is_changed = own.decode(own("two words")["input_ids"]) != "two words"
    assert ("tokenizes differently from tokenizer.json" in capsys.readouterr().out) == is_changed
    score(config_of(expected, rows, out=tmp_path / "expected"))
    assert ids_of(refs) == ids_of(tmp_path / "expected")
    first = json.loads(rows.read_text().splitlines()[0])
    assert first["prompt"][-1]["content"] in texts_of(refs, folder)[0]
    run = tmp_path / "run"
    train(training(refs, run))
    saved = AutoTokenizer.from_pretrained(run)
    assert saved.decode(saved("two words\n here")["input_ids"]) == "two words\n here"
    assert saved.chat_template == CHAT_TEMPLATE


def other_rules() -> PreTrainedTokenizerFast:
    """Cut digits one by one, as the merges of its vocabulary do not."""
    vocabulary = {token: i for i, token in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    vocabulary |= {"12": len(vocabulary), "34": len(vocabulary) + 1}
    tokenizer = Tokenizer(BPE(vocab=vocabulary, merges=[("1", "2"), ("3", "4")]))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("</s>", special=True, normalized=False)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")


def test_a_file_with_other_rules_for_words_is_read_as_it_is(tmp_path: Path) -> None:
    """No text is lost there, but the model was trained on other tokens."""
    folder = save_tiny(tmp_path / "m", tokenizer=other_rules())
    set_class(folder, "GPT2Tokenizer")
    filed = Tokenizer.from_file(str(folder / "tokenizer.json"))
    notes: list[str] = []
    tokenizer = load_tokenizer(AutoTokenizer, folder, trust_remote_code=False, notes=notes)
    assert tokenizer("x 1234")["input_ids"] == filed.encode("x 1234").ids
    assert len(filed.encode("1234").ids) == 4
    assert len(notes) == 1


def sentencepiece() -> PreTrainedTokenizerFast:
    """Llama 2's file: a normalizer writes the spaces, and one before each piece."""
    vocabulary = {
        token: i for i, token in enumerate(["<unk>", *(f"<0x{i:02X}>" for i in range(256)), "\u2581", *"helo"])
    }
    tokenizer = Tokenizer(BPE(vocab=vocabulary, merges=[], unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    space = [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    tokenizer.normalizer = normalizers.Sequence(space)
    parts = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(parts)
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in ("<unk>", "<s>", "</s>")]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def test_where_a_class_only_sets_the_first_space_it_is_kept(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "m", tokenizer=sentencepiece())
    set_class(folder, "LlamaTokenizer")
    notes: list[str] = []
    tokenizer = load_tokenizer(AutoTokenizer, folder, trust_remote_code=False, notes=notes)
    assert type(tokenizer).__name__ == "LlamaTokenizer"
    assert notes == []


@pytest.mark.parametrize("name", [None, "GPT2Tokenizer"])
def test_a_class_that_reads_as_its_file_is_kept(name: str | None, base: Path, tmp_path: Path) -> None:
    folder = save_tiny(
        tmp_path / "m", tokenizer=PreTrainedTokenizerFast(tokenizer_object=gpt2_like(), eos_token="</s>")
    )
    if name:
        set_class(folder, name)
    notes: list[str] = []
    tokenizer = load_tokenizer(AutoTokenizer, folder, trust_remote_code=False, notes=notes)
    assert type(tokenizer).__name__ == (name or "TokenizersBackend")
    assert notes == []


def gpt2_like() -> Tokenizer:
    tokenizer = tiny_tokenizer().backend_tokenizer
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return tokenizer


def test_what_transformers_warns_of_is_said(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load = AutoTokenizer.from_pretrained

    def warns(*arguments: Any, **options: Any) -> Any:
        logging.getLogger("transformers.x").warning("an incorrect\nregex; set `fix_mistral_regex=True`")
        logging.getLogger("transformers.x").warning("something\nelse")
        return load(*arguments, **options)

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", warns)
    notes: list[str] = []
    level = logging.getLogger("transformers").level
    load_tokenizer(AutoTokenizer, base, trust_remote_code=False, notes=notes)
    assert "--tokenizer-kwargs fix_mistral_regex=true" in notes[0]
    assert notes[1] == "something else"
    assert logging.getLogger("transformers").level == level


def test_merges_are_not_left_out_at_random(base: Path, rows: Path, tmp_path: Path) -> None:
    def split(folder: Path) -> set[str]:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        return {str(tokenizer("hello world " * 8)["input_ids"]) for _ in range(20)}

    model = copytree(base, tmp_path / "model")
    file = json.loads((model / "tokenizer.json").read_text())
    file["model"]["dropout"] = 0.5
    (model / "tokenizer.json").write_text(json.dumps(file))
    assert len(split(model)) > 1
    notes: list[str] = []
    load_tokenizer(AutoTokenizer, model, trust_remote_code=False, notes=notes)
    assert "BPE-dropout" in notes[0]
    for name, reference in (("without", base), ("with", model)):
        score(PrecomputeConfig(model=str(reference), data=str(rows), out=str(tmp_path / name)))
    ids = [pq.read_table(tmp_path / name / "train")["prompt_ids"].to_pylist() for name in ("without", "with")]
    assert ids[0] == ids[1]
    train(TrainConfig(cache=str(tmp_path / "with"), out=tmp_path / "run", max_steps=1))
    assert split(tmp_path / "run") == split(base)


def test_tokenizer_kwargs_are_recorded_and_used_again(base: Path, rows: Path, tmp_path: Path) -> None:
    """A tokenizer that splits special tokens in texts reads ChatML as letters."""
    score(config_of(base, rows, tokenizer_kwargs="split_special_tokens=true"))
    manifest = read_manifest(tmp_path / "refs")
    assert manifest.tokenizer["options"] == {"split_special_tokens": True}
    end = tiny_tokenizer().convert_tokens_to_ids("<|im_end|>")
    assert all(end not in ids for ids in ids_of(tmp_path / "refs"))
    train(training(tmp_path / "refs", tmp_path / "run"))  # the same tokenizer, by its hash


def test_settings_are_read_as_pairs_and_as_json() -> None:
    expected = {"enable_thinking": False, "effort": "low", "n": 3}
    assert parse_settings("enable_thinking=false, effort=low,n=3", "--x") == expected
    assert parse_settings(json.dumps(expected), "--x") == expected
    assert parse_settings("a=False", "--x") == {"a": False}
    assert parse_settings(None, "--x") == {}


@pytest.mark.parametrize("text", ["thinking", '{"a": ', "[1]", '{"a": NaN}', "a-b=1", '{"x }}": 1}', "=1"])
def test_settings_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"^--chat-template-kwargs"):
        PrecomputeConfig(model="m", data="d", chat_template_kwargs=text)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("chat_template_kwargs", "tools=1"),
        ("tokenizer_kwargs", "trust_remote_code=true"),
        ("tokenizer_kwargs", "vocab_file=/etc/passwd"),
        ("template_date", "tomorrow"),
    ],
)
def test_options_that_mean_nothing_are_refused(option: str, value: str) -> None:
    with pytest.raises(ConfigError, match=f"^--{option.replace('_', '-')}"):
        PrecomputeConfig(model="m", data="d", **{option: value})


THINKS = CHAT_TEMPLATE.replace(
    "<|im_start|>assistant\n' }}",
    "<|im_start|>assistant\n' }}{% if enable_thinking is not defined or enable_thinking %}{{ '<think>' }}{% endif %}",
)


def test_template_settings_feed_all_rows_and_what_is_saved(rows: Path, tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "m", tokenizer=tiny_tokenizer(chat_template=THINKS))
    config = config_of(folder, rows)
    with pytest.raises(KTOError, match="--chat-template-kwargs enable_thinking=false"):
        score(config)
    score(replace(config, chat_template_kwargs="enable_thinking=false"))
    expected = config_of(save_tiny(tmp_path / "right"), rows, out=tmp_path / "expected")
    score(expected)
    assert ids_of(tmp_path / "refs") == ids_of(tmp_path / "expected")
    assert read_manifest(tmp_path / "refs").tokenizer["chat_template_kwargs"] == {"enable_thinking": False}
    train(training(tmp_path / "refs", tmp_path / "run"))
    saved = AutoTokenizer.from_pretrained(tmp_path / "run")
    ask = [{"role": "user", "content": "Where?"}]
    prompt = saved.apply_chat_template(ask, tokenize=False, add_generation_prompt=True)
    assert prompt == "<|im_start|>user\nWhere?<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize("as_json", [False, True])
def test_a_template_in_a_file_feeds_all_rows_and_what_is_saved(as_json: bool, rows: Path, tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "m", tokenizer=tiny_tokenizer(chat_template=None))
    file = tmp_path / "template"
    file.write_text(json.dumps({"chat_template": CHAT_TEMPLATE}) if as_json else CHAT_TEMPLATE)
    score(config_of(folder, rows, chat_template=file))
    file.unlink()
    score(config_of(save_tiny(tmp_path / "right"), rows, out=tmp_path / "expected"))
    assert ids_of(tmp_path / "refs") == ids_of(tmp_path / "expected")
    train(training(tmp_path / "refs", tmp_path / "run"))
    assert AutoTokenizer.from_pretrained(tmp_path / "run").chat_template == CHAT_TEMPLATE


def test_another_template_is_another_cache(base: Path, rows: Path, tmp_path: Path) -> None:
    score(config_of(base, rows))
    file = tmp_path / "template.jinja"
    file.write_text("{# another #}" + CHAT_TEMPLATE)
    with pytest.raises(KTOError, match=r"tokenizer\.chat_template_hash: "):
        score(config_of(base, rows, chat_template=file))


def test_without_the_options_the_manifest_is_as_it_was(cache: Path) -> None:
    manifest = read_manifest(cache)
    assert set(manifest.tokenizer) == {"files_hash", "chat_template_hash"}
    assert set(manifest.tokenization) == {"max_length", "rule", "chat"}


@pytest.mark.parametrize("content", [None, "", "\xff"])
def test_a_template_that_cannot_be_read_is_refused(content: str | None, base: Path, rows: Path, tmp_path: Path) -> None:
    file = tmp_path / "template.jinja"
    if content is not None:
        file.write_bytes(content.encode("latin-1"))
    with pytest.raises(ConfigError, match=r"^--chat-template "):
        score(config_of(base, rows, chat_template=file))


def test_a_setting_that_the_template_does_not_read_is_said(
    base: Path, rows: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    score(config_of(base, rows, chat_template_kwargs="enable_thinkin=false", dry_run=True))
    assert "warning     --chat-template-kwargs enable_thinkin: the chat template has no such" in capsys.readouterr().out


DATED = "{{ strftime_now('%d %b %Y') }}" + CHAT_TEMPLATE


@pytest.fixture
def dated(tmp_path: Path) -> Path:
    return save_tiny(tmp_path / "dated", tokenizer=tiny_tokenizer(chat_template=DATED))


class Tomorrow(datetime):
    @classmethod
    def now(cls, tz: Any = None) -> datetime:
        return datetime(2026, 3, 1, 12) if tz is None else datetime.now(tz)


@pytest.fixture
def tomorrow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offline_kto.precompute.parallel_reading, "datetime", Tomorrow)


def today(folder: Path, refs: Path) -> str:
    return texts_of(refs, folder)[0][: len("01 Mar 2026")]


def test_tomorrow_the_same_command_scores_nothing(
    dated: Path, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(dated, rows)
    score(config)
    day = datetime.now()
    assert today(dated, config.out) in {(day - timedelta(days=n)).strftime("%d %b %Y") for n in (0, 1)}
    assert "the chat template writes the date: all rows are rendered for " in capsys.readouterr().out
    before = (tmp_path / "refs/manifest.json").read_bytes()
    monkeypatch.setattr(offline_kto.precompute.parallel_reading, "datetime", Tomorrow)
    score(config)
    assert "complete" in capsys.readouterr().out
    assert (tmp_path / "refs/manifest.json").read_bytes() == before
    write_rows(rows, chat_rows(9))
    score(config)
    assert "(14 reused)" in capsys.readouterr().out or read_manifest(tmp_path / "refs").run["reused_sequences"] > 8


@pytest.mark.usefixtures("tomorrow")
def test_a_cache_that_does_not_say_was_rendered_when_it_was_made(dated: Path, rows: Path, tmp_path: Path) -> None:
    """Read caches of earlier versions."""
    config = config_of(dated, rows)
    score(config)
    assert today(dated, config.out) == "01 Mar 2026"
    out = tmp_path / "refs"
    manifest = read_manifest(out)
    assert manifest.tokenization["rendered_on"] == "2026-03-01T12:00:00"
    from offline_kto.kto_core.cache.manifest import checksum

    content = json.loads((out / "manifest.json").read_text())
    del content["tokenization"]["rendered_on"]
    content["created"] = "2026-03-02T12:00:00+00:00"
    content["checksum"] = checksum(content)
    (out / "manifest.json").write_text(json.dumps(content))
    from offline_kto.precompute.out_folder import rendered_on

    found = rendered_on(out)
    assert found is not None
    assert found.date().isoformat() == "2026-03-02"


@pytest.mark.usefixtures("tomorrow")
def test_an_unfinished_cache_keeps_its_day(
    dated: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(dated, rows)
    score(config)
    ids = ids_of(tmp_path / "refs")
    (tmp_path / "refs/manifest.json").unlink()
    monkeypatch.setattr(offline_kto.precompute.parallel_reading, "datetime", datetime)
    score(config)
    assert ids_of(tmp_path / "refs") == ids
    assert read_manifest(tmp_path / "refs").run["scored_sequences"] == 0


def test_the_day_can_be_given(dated: Path, rows: Path, tmp_path: Path) -> None:
    config = config_of(dated, rows, template_date="2024-07-26")
    score(config)
    assert today(dated, config.out) == "26 Jul 2024"
    assert read_manifest(tmp_path / "refs").tokenization["rendered_on"] == "2024-07-26T00:00:00"


@pytest.mark.usefixtures("tomorrow")
def test_rows_of_another_day_are_never_called_new(
    dated: Path, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = config_of(dated, rows, template_date="2024-07-26")
    score(config)
    run = tmp_path / "run"
    training_config = training(tmp_path / "refs", run)
    train(training_config)
    score(replace(config, out=tmp_path / "other", template_date=None))
    capsys.readouterr()
    evaluate_run(replace(training_config, cache=tmp_path / "other", evaluate_only=run))
    said = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("rows"))
    assert "not trained on" not in said
    assert "8: all of them; their chat template wrote the date, 2026-03-01" in said
    score(replace(config, out=tmp_path / "same"))
    evaluate_run(replace(training_config, cache=tmp_path / "same", evaluate_only=run))
    assert "the run was trained on their prompts" in capsys.readouterr().out


def test_fixing_mistrals_rule_changes_the_ids(tmp_path: Path) -> None:
    """More than 100,000 tokens, Mistral's kind of model, an old version: what transformers looks at."""
    vocabulary = {token: i for i, token in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    vocabulary |= {"aB": len(vocabulary)}
    vocabulary |= {f"\u0120dummy{i}": len(vocabulary) + i for i in range(100_000)}
    tokenizer = Tokenizer(BPE(vocab=vocabulary, merges=[("a", "B")]))
    split = pre_tokenizers.Split(Regex(r"\p{L}+|[^\p{L}]"), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    folder = tmp_path / "m"
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    config = {"model_type": "mistral", "transformers_version": "4.50.0", "architectures": ["MistralForCausalLM"]}
    (folder / "config.json").write_text(json.dumps(config))
    notes: list[str] = []
    as_filed = load_tokenizer(AutoTokenizer, folder, trust_remote_code=False, notes=notes)
    assert len(as_filed("aB")["input_ids"]) == 1
    assert "fix_mistral_regex=true" in notes[0]
    notes.clear()
    fixed = load_tokenizer(
        AutoTokenizer, folder, trust_remote_code=False, options={"fix_mistral_regex": True}, notes=notes
    )
    assert len(fixed("aB")["input_ids"]) == 2
    assert notes == []
