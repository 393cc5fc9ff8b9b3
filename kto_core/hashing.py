"""Hash content that determines scores: equal hashes mean equal numbers.

Tensors, token ids, tokenizer rules and templates are hashed by content. Paths, sharding, time stamps and objects that
change when they are used are left out.
"""

import hashlib
import json
import mmap
import os
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO

import numpy as np

from offline_kto.kto_core.errors import ModelError, said_by
from offline_kto.kto_core.library_types import Tokenizer

# An id of content in arrays: the 16 bytes that its text has as 32 hexadecimal digits. Both sort alike.
ID = np.dtype("V16")
_TOKEN_ID = np.dtype("<i4")


def sequence_id(prompt_ids: np.ndarray, completion_ids: np.ndarray) -> str:
    """Return the content id of a prompt and a completion with the boundary between them (`row_id`)."""
    return _hash_ids(prompt_ids, completion_ids).hex()


def sequence_bytes(prompt_ids: np.ndarray, completion_ids: np.ndarray) -> bytes:
    """Return the bytes of `sequence_id`, as arrays of dtype `ID` contain them."""
    return _hash_ids(prompt_ids, completion_ids)


def ids_id(ids: np.ndarray) -> str:
    """Return the content id of one list of token ids (`prompt_id`)."""
    return _hash_ids(ids).hex()


def id_array(ids: Iterable[str]) -> np.ndarray:
    """Return content ids as an array of their 16 bytes (dtype `ID`)."""
    return np.fromiter(map(bytes.fromhex, ids), dtype=ID)


def hex_ids(ids: np.ndarray) -> list[str]:
    """Return ids as texts. Args: ids: one-dimensional, dtype `ID`."""
    return ids.tobytes().hex(" ", ID.itemsize).split()


def _hash_ids(*parts: np.ndarray) -> bytes:
    # Each part is preceded by its length: [1, 2] + [3] and [1] + [2, 3] differ.
    content = b"".join([one for part in parts for one in (len(part).to_bytes(8, "little"), _bytes_of(part))])
    return hashlib.sha256(content).digest()[: ID.itemsize]


def _bytes_of(ids: np.ndarray) -> bytes:
    return np.asarray(ids, dtype=_TOKEN_ID).tobytes()


def json_hash(value: object) -> str:
    """Return the sha256 of a JSON value in canonical form (sorted keys, no white space)."""
    return hashlib.sha256(_canonical(value).encode()).hexdigest()


class ListHash:
    """Computes `json_hash` of a list whose items are added one after the other, so that it is never in memory."""

    def __init__(self) -> None:
        self._hasher = hashlib.sha256(b"[")
        self._is_empty = True

    def add(self, items: Sequence[object]) -> None:
        """Add some items at the end of the list."""
        self.add_encoded(encoded_items(items))

    def add_encoded(self, items: bytes) -> None:
        """Add items as `encoded_items` returns them."""
        if items:
            self._hasher.update(b"" if self._is_empty else b",")
            self._hasher.update(items)
            self._is_empty = False

    def hexdigest(self) -> str:
        """Return the hash of the list so far."""
        hasher = self._hasher.copy()
        hasher.update(b"]")
        return hasher.hexdigest()


def encoded_items(items: Sequence[object]) -> bytes:
    """Return items as JSON in canonical form, with commas between them."""
    return _canonical([*items])[1:-1].encode()


def _canonical(value: object) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, default=str)


def file_hash(path: Path) -> str:
    """Return the sha256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _digest(file)


def _digest(file: BinaryIO) -> str:  # Python 3.10
    hasher = hashlib.sha256()
    while block := file.read(1 << 20):
        hasher.update(block)
    return hasher.hexdigest()


def file_hashes(paths: Iterable[Path]) -> list[str]:
    """Return `file_hash` of many files, computed in parallel (hashing releases the interpreter's lock)."""
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        return list(pool.map(file_hash, paths))


def weights_hash(folder: Path, *, on_bytes: Callable[[int], None] | None = None) -> str:
    """Return a hash of every tensor (name, dtype, shape, bytes) in a folder's safetensors files.

    The hash does not depend on how the tensors are split into files.

    Args:
        folder: contains `*.safetensors`.
        on_bytes: called with the number of bytes hashed since the last call (for a progress bar); may raise to stop.

    Raises:
        ModelError: no safetensors file, or a damaged one.
    """
    tensors: dict[str, tuple[Path, str, list[int], int, int]] = {}
    for path in weight_files(folder):
        for name, (dtype, shape, start, end) in safetensors_header(path).items():
            tensors[name] = (path, dtype, shape, start, end)
    if not tensors:
        raise ModelError(
            f"{folder}: no *.safetensors file. Weights in pickle files are not read; "
            "load the model once with transformers and save it with save_pretrained()."
        )

    def digest(name: str) -> str:
        path, dtype, shape, start, end = tensors[name]
        if on_bytes:
            on_bytes(0)  # may raise, to stop before the next tensor
        hasher = hashlib.sha256(f"{name} {dtype} {shape} ".encode())
        if end > start:
            with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                view = memoryview(data)[start:end]
                hasher.update(view)
                view.release()
        if on_bytes:
            on_bytes(end - start)
        return hasher.hexdigest()

    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        digests = list(pool.map(digest, sorted(tensors)))
    return json_hash(digests)


def weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files that loading the folder reads, without backups and leftovers next to them.

    Raises:
        ModelError: an index that cannot be read.
    """
    for name in ("model.safetensors", "adapter_model.safetensors"):
        if (folder / name).exists():
            return [folder / name]
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        return sorted(folder.glob("*.safetensors"))
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        return [folder / name for name in sorted(names)]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(
            f"{index}: not a complete index of safetensors files ({error}). Copy the model again."
        ) from error


def weights_bytes(folder: Path) -> int:
    """Return the total size of the files that `weights_hash` reads."""
    return sum(path.stat().st_size for path in weight_files(folder) if path.exists())


def stored_type(folder: Path) -> str | None:
    """Return the type of most of a model's floating-point weights, F32, BF16 or F16; None if it has none.

    Raises:
        ModelError: a file that is damaged.
    """
    sizes: Counter[str] = Counter()
    for path in weight_files(folder):
        for dtype, _, start, end in safetensors_header(path).values():
            if dtype in ("F32", "BF16", "F16"):
                sizes[dtype] += end - start
    return max(sizes, key=lambda dtype: sizes[dtype]) if sizes else None


def safetensors_header(path: Path) -> dict[str, tuple[str, list[int], int, int]]:
    """Return tensor name -> dtype, shape, first and last byte in the file (8 bytes of header length, then JSON)."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length)) if 0 < length <= size - 8 else None
        if not isinstance(header, dict):
            raise ValueError("its header is truncated")
        tensors = {}
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            name.encode()  # a lone surrogate cannot be hashed
            start, end = (8 + length + int(offset) for offset in entry["data_offsets"])
            if not 8 + length <= start <= end <= size:
                raise ValueError(f"tensor {name!r} ends at byte {end} of {size}")
            tensors[name] = (str(entry["dtype"]), list(entry["shape"]), start, end)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise ModelError(
            f"{path}: not a complete safetensors file ({said_by(error)}). Copy the model again."
        ) from error
    return tensors


# Keys that depend on the program that saved config.json last; none of them changes a score.
_VOLATILE_CONFIG = {
    "_name_or_path",
    "transformers_version",
    "torch_dtype",
    "dtype",
    "architectures",
    "use_cache",
}


def config_hash(config: dict[str, object]) -> str:
    """Return a hash of a model configuration, without the keys that depend on the program that saved it."""
    return json_hash({key: value for key, value in config.items() if key not in _VOLATILE_CONFIG})


def tokenizer_hash(tokenizer: Tokenizer) -> str:
    """Return a hash of the rules that turn text into ids: merges, vocabulary, normalizers, added and special tokens.

    Padding and truncation are left out: a tokenizer stores them in itself on every call.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        rules = json.loads(backend.to_str())
        rules.pop("padding", None)
        rules.pop("truncation", None)
    else:
        rules = {"class": type(tokenizer).__name__, "vocabulary": tokenizer.get_vocab()}
    special = {name: str(token) for name, token in sorted(tokenizer.special_tokens_map.items())}
    return json_hash({"rules": rules, "special": special})


def chat_template_hash(tokenizer: Tokenizer) -> str | None:
    """Return a hash of the chat template, or None if the tokenizer has none."""
    template = getattr(tokenizer, "chat_template", None)
    return json_hash(template) if template else None
