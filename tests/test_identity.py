import hashlib
import shutil

import numpy as np
import pytest
import torch
import transformers
from hypothesis import assume, given
from hypothesis import strategies as st
from models import MERGES, save_tiny, tiny_model, tiny_tokenizer
from safetensors.torch import load_file, save_file

from offline_kto.kto_core.errors import ModelError
from offline_kto.kto_core.hashing import (
    ID,
    ListHash,
    chat_template_hash,
    config_hash,
    file_hash,
    file_hashes,
    hex_ids,
    id_array,
    ids_id,
    json_hash,
    sequence_bytes,
    sequence_id,
    tokenizer_hash,
    weights_bytes,
    weights_hash,
)


def ids(*values):
    return np.array(values, dtype=np.int32)


def test_the_boundary_is_part_of_a_row():
    assert sequence_id(ids(1, 2), ids(3)) != sequence_id(ids(1), ids(2, 3))
    assert sequence_id(ids(1, 2), ids(3)) != ids_id(ids(1, 2, 3))


token_ids = st.lists(st.integers(0, 2**31 - 1), max_size=4)


@given(token_ids, token_ids, token_ids, token_ids)
def test_other_rows_have_other_ids(prompt, completion, other_prompt, other_completion):
    assume((prompt, completion) != (other_prompt, other_completion))
    assert sequence_id(ids(*prompt), ids(*completion)) != sequence_id(ids(*other_prompt), ids(*other_completion))


def test_ids_do_not_depend_on_how_the_array_is_stored():
    wide = np.array([7, 0, 8, 0, 9, 0], dtype=np.int64)[::2]
    assert ids_id(wide) == ids_id(ids(7, 8, 9))
    assert ids_id(np.array([7, 8, 9], dtype=">i4")) == ids_id(ids(7, 8, 9))


def test_ids_are_those_of_every_cache_written_before():
    """A change here would make every existing cache worthless."""
    assert ids_id(ids(1, 2, 3)) == "62464da5afe5d016e96fc02cdb43c012"
    assert sequence_id(ids(1, 2), ids(3)) == "9dcca540ef9c09da1ad7825b89195f95"


def test_json_hash_ignores_the_order_of_keys_and_nothing_else():
    assert json_hash({"a": 1, "b": [1, 2]}) == json_hash({"b": [1, 2], "a": 1})
    assert json_hash({"a": [1, 2]}) != json_hash({"a": [2, 1]})
    assert json_hash({"a": 1}) != json_hash({"a": "1"})


values = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), st.text())


@given(st.lists(st.lists(st.one_of(values, st.lists(values), st.dictionaries(st.text(), values)))))
@pytest.mark.slow
def test_the_hash_of_a_list_that_is_never_whole(parts):
    found = ListHash()
    for part in parts:
        found.add(part)
        found.hexdigest()  # adds nothing
    assert found.hexdigest() == json_hash([item for part in parts for item in part])


def test_ids_in_arrays_are_those_in_texts_and_sort_alike():
    texts = [sequence_id(ids(i), ids(i, i)) for i in range(99)]
    found = id_array(texts)
    assert found.dtype == ID
    assert hex_ids(found) == texts
    assert hex_ids(np.sort(found)) == sorted(texts)
    assert found[7].tobytes() == sequence_bytes(ids(7), ids(7, 7))


def test_file_hashes(tmp_path):
    contents = [b"", b"one", b"x" * 3_000_000]
    paths = [tmp_path / str(i) for i in range(3)]
    for path, content in zip(paths, contents, strict=True):
        path.write_bytes(content)
    expected = [hashlib.sha256(content).hexdigest() for content in contents]
    assert file_hashes(paths) == [file_hash(path) for path in paths] == expected


@pytest.fixture
def model_folder(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_weights_hash_the_same_in_one_file_or_many_and_in_any_folder(model_folder, tmp_path):
    tiny_model("llama").save_pretrained(tmp_path / "elsewhere", max_shard_size="5KB")
    assert len(list((tmp_path / "elsewhere").glob("*.safetensors"))) > 2
    assert weights_hash(tmp_path / "elsewhere") == weights_hash(model_folder)
    shutil.copytree(model_folder, tmp_path / "copy")
    assert weights_hash(tmp_path / "copy") == weights_hash(model_folder)


def renamed(tensors):
    return {("other." + name if name == "lm_head.weight" else name): tensor for name, tensor in tensors.items()}


def one_bit(tensors):
    weight = tensors["lm_head.weight"]
    weight[3, 4] = torch.nextafter(weight[3, 4], torch.tensor(9.0))
    return tensors


def exchanged(tensors):
    first, second = "model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.weight"
    return {**tensors, first: tensors[second], second: tensors[first]}


CHANGES = {
    "one bit of one value": one_bit,
    "a name": renamed,
    "two tensors exchanged": exchanged,
    "another shape": lambda tensors: {**tensors, "lm_head.weight": tensors["lm_head.weight"].reshape(16, -1)},
    "another dtype": lambda tensors: {**tensors, "lm_head.weight": tensors["lm_head.weight"].view(torch.int32)},
    "one tensor more": lambda tensors: {**tensors, "more": torch.zeros(1)},
    "one tensor less": lambda tensors: {name: t for name, t in tensors.items() if name != "lm_head.weight"},
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_weights_hash_changes_with(change, model_folder):
    before = weights_hash(model_folder)
    path = model_folder / "model.safetensors"
    save_file(change(load_file(path)), path)
    assert weights_hash(model_folder) != before


def test_weights_hash_reports_every_byte_once(model_folder):
    reported = []
    weights_hash(model_folder, on_bytes=reported.append)
    tensors = load_file(model_folder / "model.safetensors").values()
    assert sum(reported) == sum(t.numel() * t.element_size() for t in tensors)
    assert weights_bytes(model_folder) == (model_folder / "model.safetensors").stat().st_size > sum(reported)


def cut_to(fraction):
    return lambda data: data[: int(len(data) * fraction)]


DAMAGES = {
    "empty": lambda data: b"",
    "cut in the header's length": lambda data: data[:5],
    "cut in the header": lambda data: data[:200],
    "cut in the tensors": cut_to(0.7),
    "last byte lost": lambda data: data[:-1],
    "a pointer of git-lfs": lambda data: b"version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 12345\n",
    "a web page": lambda data: b"<!DOCTYPE html><html><body>404</body></html>",
    "a header that is no mapping": lambda data: (2).to_bytes(8, "little") + b"[]" + data,
    "a tensor without a place": lambda data: (18).to_bytes(8, "little") + b'{"w":{"dtype":"I"}}'[:18] + data,
    "not text": lambda data: data[:8] + b"\xff" * (len(data) - 8),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_damaged_weights_are_refused(damage, model_folder):
    path = model_folder / "model.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ModelError, match=r"model\.safetensors: not a complete safetensors file .*Copy the model again"):
        weights_hash(model_folder)


def test_a_folder_with_pickled_weights_only_is_refused(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"anything")
    with pytest.raises(ModelError, match=r"no \*\.safetensors file. Weights in pickle files are not read"):
        weights_hash(tmp_path)


def test_a_tokenizer_hashes_the_same_after_it_was_called():
    """It writes padding and truncation into itself; `datasets` fingerprints change for that reason."""
    tokenizer = tiny_tokenizer(bos=True)
    before, rules = tokenizer_hash(tokenizer), tokenizer.backend_tokenizer.to_str()
    tokenizer(["hello", "hello world"], padding="max_length", truncation=True, max_length=16)
    assert tokenizer.backend_tokenizer.to_str() != rules
    assert tokenizer_hash(tokenizer) == before


def test_a_tokenizer_hashes_the_same_when_saved_and_loaded_in_any_folder(tmp_path):
    tokenizer = tiny_tokenizer(bos=True)
    hashes = {tokenizer_hash(tokenizer)}
    for name in ("here", "there"):
        tokenizer.save_pretrained(tmp_path / name)
        loaded = transformers.AutoTokenizer.from_pretrained(str(tmp_path / name))
        hashes.add(tokenizer_hash(loaded))
        assert chat_template_hash(loaded) == chat_template_hash(tokenizer)
    assert len(hashes) == 1


def with_added_token():
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<tool>"])
    return tokenizer


TOKENIZERS = {
    "fewer merges": lambda: tiny_tokenizer(merges=MERGES[:-1]),
    "merges in another order": lambda: tiny_tokenizer(merges=(MERGES[1], MERGES[0], *MERGES[2:])),
    "an added token": with_added_token,
    "a BOS of its own": lambda: tiny_tokenizer(bos=True),
    "an EOS of its own": lambda: tiny_tokenizer(closes=True),
    "no EOS": lambda: tiny_tokenizer(eos=False),
}


@pytest.mark.parametrize("make", TOKENIZERS.values(), ids=TOKENIZERS.keys())
def test_a_tokenizer_that_differs_by(make):
    assert tokenizer_hash(make()) != tokenizer_hash(tiny_tokenizer())


def test_the_chat_template_has_its_own_hash():
    plain, other, none = tiny_tokenizer(), tiny_tokenizer(chat_template="{{ 1 }}"), tiny_tokenizer(chat_template=None)
    assert tokenizer_hash(plain) == tokenizer_hash(other) == tokenizer_hash(none)
    assert chat_template_hash(plain) == chat_template_hash(tiny_tokenizer()) != chat_template_hash(other)
    assert chat_template_hash(none) is None


def test_a_configuration_hashes_the_same_in_any_folder(tmp_path):
    folders = [save_tiny(tmp_path / name) for name in ("here", "there")]
    here, there = (transformers.AutoConfig.from_pretrained(str(folder)).to_dict() for folder in folders)
    assert here["_name_or_path"] != there["_name_or_path"]
    assert config_hash(here) == config_hash(there)


def test_a_configuration_hashes_the_same_whoever_saved_it():
    config = tiny_model("llama").config.to_dict()
    saved = {**config, "transformers_version": "4.1", "_name_or_path": "/x", "dtype": "bfloat16", "use_cache": False}
    assert config_hash(saved) == config_hash(config)


@pytest.mark.parametrize("change", [{"rms_norm_eps": 1e-3}, {"num_hidden_layers": 3}, {"rope_theta_new": 1.0}])
def test_a_configuration_that_changes_numbers_hashes_differently(change):
    config = tiny_model("llama").config.to_dict()
    assert config_hash({**config, **change}) != config_hash(config)
