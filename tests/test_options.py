import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from offline_kto.kto_core.errors import ConfigError, nearest
from offline_kto.kto_core.options import as_plain, click_settings, flag, number_or_auto, option, resolve, value_types
from offline_kto.kto_core.yaml_files import read_yaml
from offline_kto.precompute.config import PrecomputeConfig
from offline_kto.train.config import TrainConfig


@dataclass(frozen=True)
class Options:
    learning_rate: float = option(1e-6, "Step size.")
    max_steps: int = option(10, "Updates.")
    limit: int | None = option(None, "Rows.", metavar="N")
    weight: float | str = option(1.0, "Weight.")
    model: str | None = option(None, "Model.")
    out: Path = option(Path("refs"), "Folder.", metavar="DIR")
    run_name: Path | None = option(None, "This run.", yaml=False)
    shuffle: bool = option(True, "Shuffle.", off="--no-shuffle")
    overwrite: bool = option(False, "Overwrite.")
    loss: str = option("kto", "Loss.", choices=("kto", "sigmoid"))
    names: tuple[str, ...] = option((), "Names.")
    training: dict[str, Any] = option(dict, "For the Trainer.")

    def __post_init__(self):
        if self.max_steps < 1:
            raise ConfigError(f"--max-steps must be at least 1, got {self.max_steps}.")


@pytest.fixture
def from_yaml(tmp_path):
    def read(text, **command_line):
        path = tmp_path / "kto.yaml"
        path.write_text(text, encoding="utf-8")
        return resolve(Options, command_line, yaml_path=path)

    return read


@pytest.fixture
def refusal(from_yaml, tmp_path):
    """The message of a refused YAML file, without the folder it is in."""

    def read(text):
        with pytest.raises(ConfigError) as caught:
            from_yaml(text)
        message = str(caught.value)
        assert "\n" not in message
        return message.replace(f"{tmp_path}/", "")

    return read


def test_types_come_from_the_dataclass():
    assert value_types(Options) == {
        "learning_rate": (float,),
        "max_steps": (int,),
        "limit": (int,),
        "weight": (float, str),
        "model": (str,),
        "out": (Path,),
        "run_name": (Path,),
        "shuffle": (bool,),
        "overwrite": (bool,),
        "loss": (str,),
        "names": (tuple,),
        "training": (dict,),
    }


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-6", 1e-6),
        ("1E-6", 1e-6),
        ("5.0e-7", 5e-7),
        ("+1e3", 1000.0),
        ("-1.5e+2", -150.0),
        (".5", 0.5),
        ("2.", 2.0),
        ("1", 1.0),
        ("0.1", 0.1),
        (".inf", math.inf),
    ],
)
def test_numbers_are_numbers(from_yaml, text, value):
    found = from_yaml(f"learning_rate: {text}").learning_rate
    assert found == value
    assert isinstance(found, float)


@pytest.mark.parametrize("text", ["1.2.3", "e5", "1e", "1e-", ".", "v1", "1_000a", "main"])
def test_words_that_look_a_little_like_numbers_are_text(from_yaml, text):
    assert from_yaml(f"model: {text}").model == text


@pytest.mark.parametrize(
    ("text", "field", "value"),
    [
        ("max_steps: 5", "max_steps", 5),
        ("max_steps: 2e3", "max_steps", 2000),
        ("max_steps: 7.0", "max_steps", 7),
        ("max-steps: 5", "max_steps", 5),
        ("limit: null", "limit", None),
        ("limit: ~", "limit", None),
        ("limit: 3", "limit", 3),
        ("weight: auto", "weight", "auto"),
        ("weight: 2", "weight", 2.0),
        ("out: runs/a b", "out", Path("runs/a b")),
        ("shuffle: false", "shuffle", False),
        ("loss: sigmoid", "loss", "sigmoid"),
        ("names: [a, b]", "names", ("a", "b")),
        ("training: {fsdp: full, nested: {a: 1e-3}}", "training", {"fsdp": "full", "nested": {"a": 1e-3}}),
        ("model: '007'", "model", "007"),
    ],
)
def test_values_get_the_type_of_their_field(from_yaml, tmp_path, text, field, value):
    found = getattr(from_yaml(text), field)
    assert found == (tmp_path / value if isinstance(value, Path) else value)
    assert type(found) is type(value) or isinstance(value, Path)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('shuffle: "true"', "kto.yaml: shuffle: expected true or false, got 'true'"),
        ("shuffle: 1", "expected true or false, got 1"),
        ("shuffle: null", "has no value. Give one, or delete the line to use True"),
        ("max_steps: 1.5", "expected a whole number, got 1.5"),
        ("max_steps: '5'", "expected a whole number, got '5'"),
        ("max_steps: true", "expected a whole number, got True"),
        ("max_steps: .inf", "expected a whole number, got inf"),
        ("max_steps: .nan", "expected a whole number, got nan"),
        ("max_steps:", "has no value. Give one, or delete the line to use 10"),
        ("max_steps: [1]", "expected a whole number, got [1]"),
        ("max_steps: {a: 1}", "expected a whole number, got {'a': 1}"),
        ("max_steps: 2024-01-02", "expected a whole number"),
        ("learning_rate: fast", "expected a number, got 'fast'"),
        ("learning_rate: '1e-6'", "expected a number, got '1e-6'. Write it without quotes: 1e-06"),
        ("learning_rate: false", "expected a number, got False"),
        ("learning_rate: null", "has no value"),
        ("model: 5", "expected text, got 5"),
        ("model: no", "expected text, got False"),
        ("out: 5", "expected a path, got 5"),
        ("weight: true", "expected a number or text, got True"),
        ("names: a", "expected a list, got 'a'"),
        ("training: 5", "expected a table, got 5"),
        ("loss: ktoo", "got 'ktoo'; choose one of kto, sigmoid. Did you mean 'kto'?"),
        ("max_steps: 0", "--max-steps must be at least 1, got 0"),
    ],
)
def test_a_value_of_another_type_is_refused_not_guessed(refusal, text, words):
    assert words in refusal(text)


@pytest.mark.parametrize(
    ("key", "suggestion"),
    [("learning_rat", "learning_rate"), ("lr_rate", "learning_rate"), ("max-step", "max_steps"), ("shufle", "shuffle")],
)
def test_an_unknown_key_names_the_nearest(refusal, key, suggestion):
    message = refusal(f"{key}: 1")
    assert f"kto.yaml: unknown key '{key}'. Did you mean '{suggestion}'? Known keys: learning_rate, " in message


def test_a_key_near_to_none_gets_no_suggestion(refusal):
    message = refusal("zzz: 1")
    assert "Did you mean" not in message
    assert "Known keys: learning_rate, max_steps" in message


@pytest.mark.parametrize("key", ["1", "true", "null", "1.5"])
def test_keys_that_are_no_words_are_unknown(refusal, key):
    assert "unknown key" in refusal(f"{key}: 1")


def test_what_names_a_run_belongs_on_the_command_line(refusal):
    assert "'run_name' belongs on the command line: --run-name" in refusal("run_name: x")


def test_nearest():
    assert nearest("bata", ["beta", "seed"]) == " Did you mean 'beta'?"
    assert nearest("xyz", ["beta", "seed"]) == ""


@pytest.mark.parametrize(
    ("text", "line", "key"),
    [
        ("max_steps: 5\nlimit: 3\nmax_steps: 6\n", 3, "max_steps"),
        ("training:\n  fsdp: full\n  fsdp: none\n", 3, "fsdp"),
    ],
)
def test_a_key_given_twice_is_refused_with_its_line(refusal, text, line, key):
    assert f"kto.yaml:{line}: '{key}' is given twice" in refusal(text)


def test_a_key_given_in_both_spellings_is_given_twice(refusal):
    assert "given twice" in refusal("max_steps: 5\nmax-steps: 6\n")


@pytest.mark.parametrize("text", ["", "\n\n", "# nothing but a comment\n", "---\n"])
def test_an_empty_file_changes_nothing(from_yaml, text):
    assert from_yaml(text) == Options()


@pytest.mark.parametrize(
    ("text", "kind"), [("- max_steps: 5\n", "list"), ("max_steps=5\n", "str"), ("5\n", "int"), ("true\n", "bool")]
)
def test_a_file_that_is_no_mapping_is_refused(refusal, text, kind):
    assert f"kto.yaml: expected `option: value` lines, found a {kind}. See configs/" in refusal(text)


@pytest.mark.parametrize(
    ("text", "where"),
    [
        ("max_steps: [1\nlimit: 3\n", "kto.yaml:2: not valid YAML"),
        ("max_steps: 5\n  limit: 3\n", "kto.yaml:2: not valid YAML"),
        ("max_steps: 5\n\tlimit: 3\n", "kto.yaml:2: not valid YAML"),
        ("max_steps: 5\n---\nlimit: 3\n", "kto.yaml:2: not valid YAML"),
        ("training: !!python/object/apply:os.getcwd []\n", "kto.yaml:1: not valid YAML"),
        ("{[1]: 2}\n", "kto.yaml:1: not valid YAML"),
        ("model: 2024-02-30\n", "kto.yaml"),
        ("model: \x07\n", "kto.yaml"),
    ],
)
def test_what_is_not_yaml_is_refused_with_its_line(refusal, text, where):
    assert refusal(text).startswith(where)


def test_a_missing_file(tmp_path):
    with pytest.raises(ConfigError, match=r"absent\.yaml: cannot be read: .*No such file"):
        read_yaml(tmp_path / "absent.yaml")


def test_a_folder_instead_of_a_file(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read"):
        read_yaml(tmp_path)


def test_a_file_that_is_not_utf8(tmp_path):
    (tmp_path / "kto.yaml").write_bytes("model: caf\u00e9".encode("latin-1"))
    with pytest.raises(ConfigError, match=r"kto\.yaml: cannot be read: 'utf-8' codec"):
        read_yaml(tmp_path / "kto.yaml")


def test_a_byte_order_mark_is_no_part_of_the_first_key(tmp_path):
    (tmp_path / "kto.yaml").write_bytes(b"\xef\xbb\xbfmax_steps: 5\n")
    assert read_yaml(tmp_path / "kto.yaml") == {"max_steps": 5}


def test_anchors_and_merges_are_yaml(tmp_path):
    (tmp_path / "kto.yaml").write_text("a: &base {x: 1}\nb: {<<: *base, y: 2}\n")
    assert read_yaml(tmp_path / "kto.yaml") == {"a": {"x": 1}, "b": {"x": 1, "y": 2}}


def test_the_command_line_goes_before_yaml_and_yaml_before_the_default(from_yaml):
    config = from_yaml("max_steps: 5\nlearning_rate: 1e-4\n", max_steps=7)
    assert (config.max_steps, config.learning_rate, config.loss) == (7, 1e-4, "kto")


def test_the_command_line_alone():
    assert resolve(Options, {"limit": 3}) == Options(limit=3)


def test_a_wrong_value_in_yaml_is_refused_even_where_the_command_line_overrides_it(from_yaml):
    with pytest.raises(ConfigError, match="expected a whole number"):
        from_yaml("max_steps: many", max_steps=7)


def test_plain_values_read_back_as_the_same_config(from_yaml):
    config = Options(limit=3, weight="auto", out=Path("/a/b"), names=("x",), training={"fsdp": "full"})
    plain = as_plain(config)
    assert list(plain) == list(value_types(Options))
    assert plain["out"] == "/a/b"
    assert plain["names"] == ["x"]
    plain.pop("run_name")
    assert from_yaml(yaml.safe_dump(plain)) == config


def test_flags_and_their_settings():
    settings = {flags[0]: one for flags, one in click_settings(Options)}
    assert "--training" not in settings  # tables live in YAML
    assert flag("learning_rate") == "--learning-rate"
    assert settings["--learning-rate"]["type"] is float
    assert settings["--limit"]["type"] is int
    assert settings["--limit"]["metavar"] == "N"
    assert "[default: none]" in settings["--limit"]["help"]
    assert settings["--weight"]["type"] is number_or_auto
    assert settings["--loss"]["choices"] == ["kto", "sigmoid"]
    assert settings["--out"]["default"] == Path("refs")
    assert settings["--shuffle/--no-shuffle"]["is_flag"] is True
    assert settings["--overwrite"]["is_flag"] is True
    assert "[default: off]" in settings["--overwrite"]["help"]


@pytest.mark.parametrize(
    ("word", "name"),
    [("fp32", "float32"), ("float", "float32"), ("bf16", "bfloat16"), ("fp16", "float16"), ("half", "float16")],
)
def test_types_have_other_names(tmp_path, word, name):
    assert PrecomputeConfig(dtype=word).dtype == name
    (tmp_path / "my.yaml").write_text(f"save_dtype: {word}\n")
    assert resolve(TrainConfig, {}, yaml_path=tmp_path / "my.yaml").save_dtype == name
    if name == "float16":  # no precision of training
        with pytest.raises(ConfigError, match="choose one of auto, float32, bfloat16"):
            TrainConfig(dtype=word)
    else:
        assert TrainConfig(dtype=word).dtype == name
    settings = {flags[0]: one for flags, one in click_settings(PrecomputeConfig)}
    assert word in settings["--dtype"]["choices"]
    assert settings["--dtype"]["metavar"] == "[auto|float32|bfloat16|float16]"


def test_number_or_auto():
    assert number_or_auto("auto") == "auto"
    assert number_or_auto("1e-3") == 1e-3
    with pytest.raises(ValueError, match="'heavy' is neither a number nor 'auto'"):
        number_or_auto("heavy")
