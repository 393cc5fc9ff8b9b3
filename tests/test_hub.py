"""The hub: what is fetched, and a hub that takes connections and never answers. No network: a socket on this machine."""

import fnmatch
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pytest
from models import save_tiny

from offline_kto.kto_core.errors import ModelError
from offline_kto.kto_core.models.folders import find_folder
from offline_kto.kto_core.models.hub import UNWANTED, WANTED
from offline_kto.kto_core.models.model_files import check_texts

COMMIT = "a" * 40

# Repositories as they are on the hub: what loading reads of them, and what else lies there.
REPOSITORIES = {
    "gpt-oss": (
        ["config.json", "model-00000-of-00002.safetensors", "model.safetensors.index.json", "chat_template.jinja"],
        ["metal/model.bin", "original/config.json", "original/model.safetensors", "README.md"],
    ),
    "Mistral": (
        ["config.json", "model-00001-of-00003.safetensors", "tokenizer.model", "tokenizer.model.v3"],
        ["consolidated.safetensors", "consolidated-00001-of-00002.safetensors"],
    ),
    "Llama": (["tokenizer.json"], ["original/consolidated.00.pth", "original/tokenizer.model", "original/params.json"]),
    "GPT-2": (
        ["vocab.json", "merges.txt", "model.safetensors"],
        ["onnx/decoder_model.onnx", "onnx/config.json", "model.fp16.safetensors", "pytorch_model.bin"],
    ),
    "an adapter": (
        ["adapter_config.json", "adapter_model.safetensors"],
        [
            "checkpoint-100/adapter_model.safetensors",
            "checkpoint-100/optimizer.pt",
            "checkpoint-100/trainer_state.json",
        ],
    ),
    "other tokenizers": (
        [
            "tiktoken.model",
            "qwen.tiktoken",
            "vocab.bpe",
            "tokenization_kimi.py",
            "additional_chat_templates/tools.jinja",
        ],
        ["model.gguf", "gguf/model-q4.gguf", "fp16/model.safetensors"],
    ),
}


@pytest.mark.parametrize(("loaded", "left"), REPOSITORIES.values(), ids=REPOSITORIES.keys())
def test_only_what_is_loaded_is_fetched(loaded: list[str], left: list[str]) -> None:
    def any_of(patterns: list[str], name: str) -> bool:
        return any(fnmatch.fnmatch(name, pattern) for pattern in patterns)

    fetched = [name for name in loaded + left if any_of(WANTED, name) and not any_of(UNWANTED, name)]
    assert fetched == loaded


@pytest.fixture
def silent_hub() -> Iterator[str]:
    """Address of a server that takes every connection and answers none."""
    server = socket.create_server(("127.0.0.1", 0), backlog=50)
    taken = []

    def accept() -> None:
        while True:
            try:
                taken.append(server.accept())
            except OSError:
                return

    threading.Thread(target=accept, daemon=True).start()
    yield f"http://127.0.0.1:{server.getsockname()[1]}"
    server.close()
    for connection, _ in taken:
        connection.close()


def hub_cache(folder: Path) -> Path:
    """The hub's cache with one snapshot of org/tiny."""
    save_tiny(folder / "models--org--tiny/snapshots" / COMMIT)
    references = folder / "models--org--tiny/refs"
    references.mkdir()
    (references / "main").write_text(COMMIT)
    return folder


@pytest.mark.slow
def test_a_silent_hub_is_waited_for_only_so_long(tmp_path: Path, silent_hub: str) -> None:
    environment = {
        "HF_ENDPOINT": silent_hub,
        "HF_HUB_CACHE": str(hub_cache(tmp_path / "hub")),
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_ETAG_TIMEOUT": "1",
    }
    program = (
        "from offline_kto.kto_core.console import shown_lines\n"
        "from offline_kto.kto_core.errors import ModelError\n"
        "from offline_kto.kto_core.models.folders import find_folder\n"
        "with shown_lines():\n    print(find_folder('org/tiny', revision=None)[1])\n"
        "try:\n    find_folder('org/absent', revision=None)\n"
        "except ModelError as error:\n    print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={**os.environ, **environment},
    )
    assert done.returncode == 0, done.stderr
    waiting, warning, commit, absent = done.stdout.splitlines()
    assert warning.startswith("warning     org/tiny: the hub did not answer; its cached copy is used")
    assert commit == COMMIT
    assert absent.startswith("org/absent: no such model folder here, and it cannot be fetched from the hub: ")
    assert waiting == "hub         waiting for the hub: org/tiny (at most 1 s without an answer)"


def test_a_commit_that_is_in_the_cache_is_not_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = hub_cache(tmp_path)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(huggingface_hub, "get_session", lambda: pytest.fail("asked"))
    assert find_folder("org/tiny", revision=COMMIT) == (cache / "models--org--tiny/snapshots" / COMMIT, COMMIT)


def test_a_commit_of_which_the_cache_lacks_weights_is_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = hub_cache(tmp_path)
    (cache / "models--org--tiny/snapshots" / COMMIT / "model.safetensors").unlink()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    asked = []
    download = huggingface_hub.snapshot_download

    def noting(name: str, **options: object) -> str:
        asked.append(options.get("local_files_only", False))
        return download(name, **{**options, "local_files_only": True})

    monkeypatch.setattr(huggingface_hub, "snapshot_download", noting)
    find_folder("org/tiny", revision=COMMIT)
    assert asked == [True, False]


@pytest.mark.parametrize(
    ("model", "advice"),
    [
        ("https://huggingface.co/org/name", r"Pass org/name\."),
        ("https://huggingface.co/org/name/tree/v1.0", r"Pass org/name with --revision v1\.0 "),
        ("hf.co/org/name/", r"Pass org/name\."),
        ("https://huggingface.co/org/name.git", r"Pass org/name\."),
        ("org/name@refs-pr-3", r"Pass org/name with --revision refs-pr-3 "),
        ("https://example.com/model", r"a web address\. Pass a local folder, or a hub id"),
    ],
)
def test_an_address_says_what_to_pass(model: str, advice: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *args, **kwargs: pytest.fail("looked up"))
    with pytest.raises(ModelError, match=advice):
        find_folder(model, revision=None)


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json", "tokenizer.model"])
def test_a_pointer_of_git_lfs_is_no_damaged_file(tmp_path: Path, name: str) -> None:
    save_tiny(tmp_path)
    (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:12\nsize 5\n")
    with pytest.raises(ModelError, match=rf"{name}: a git LFS pointer, not the file itself\. Run `git lfs pull`"):
        check_texts(tmp_path)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json"])
def test_a_byte_order_mark_is_named(tmp_path: Path, name: str, encoding: str) -> None:
    save_tiny(tmp_path)
    path = tmp_path / name
    path.write_text(path.read_text(encoding="utf-8"), encoding=encoding)
    with pytest.raises(
        ModelError, match=rf"{name}: begins with a byte-order mark \(BOM\).*Save it as UTF-8 without BOM"
    ):
        check_texts(tmp_path)
