"""Check that token ids decode to the text from which they were made."""

import itertools
import re
import unicodedata
from collections.abc import Sequence

from offline_kto.kto_core.errors import TokenizationError
from offline_kto.kto_core.library_types import Tokenizer, TokenizerBackend

# The byte-level alphabet of GPT-2: a printable character for each byte.
_PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
_BYTES = {chr(byte): byte for byte in _PRINTABLE} | {
    chr(256 + i): byte for i, byte in enumerate(byte for byte in range(256) if byte not in _PRINTABLE)
}
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_SPACE = "\u2581"
_SPACES = re.compile(r"[ \n\t]")


class Decoder:
    """Compares token ids with their text.

    In most tokenizers, byte-level or SentencePiece, each token stands for bytes, so rows are compared byte by byte. If
    the bytes differ, for example because of a normalizer, the text is compared more closely: it counts as lost if words
    run together or if characters have no token.

    Args:
        tokenizer: a `transformers` tokenizer.

    Attributes:
        special_ids: ids of special and added tokens.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._backend = getattr(tokenizer, "backend_tokenizer", None)
        self._added = {i: str(token) for i, token in getattr(tokenizer, "added_tokens_decoder", {}).items()}
        self.special_ids = frozenset({*getattr(tokenizer, "all_special_ids", ()), *self._added})
        # Bytes by token id, None until a text has the token; lists, because a lookup takes half as long as in a dict.
        self._tables: tuple[list[bytes | None], list[bytes | None]] = ([], [])
        self._kind: int | None = None  # index of the table with which the last row was equal

    def lost(self, text: str, ids: Sequence[int], where: str) -> bool:
        """Return whether ids made from a text lack some of it.

        Args:
            ids: without BOS and EOS that are not in the text.

        Raises:
            TokenizationError: the tokenizer drops white space, so that words run together.
        """
        return not self._equal(text, ids) and self._differs(text, ids, where)

    def _equal(self, text: str, ids: Sequence[int]) -> bool:
        """Return whether the tokens' bytes equal the text's, apart from a leading space that SentencePiece adds."""
        wanted = text.encode()
        for kind in (0, 1) if self._kind != 1 else (1, 0):
            found = self._joined(kind, ids)
            if found == wanted or found.removeprefix(b" ") == wanted:
                self._kind = kind
                return True
        return False

    def _joined(self, kind: int, ids: Sequence[int]) -> bytes:
        """Return the bytes of all tokens."""
        table = self._tables[kind]
        try:
            return b"".join(map(table.__getitem__, ids))  # type: ignore[arg-type]  # None raises TypeError
        except (IndexError, TypeError):
            self._fill(table, kind, ids)
            return b"".join(map(table.__getitem__, ids))  # type: ignore[arg-type]

    def _fill(self, table: list[bytes | None], kind: int, ids: Sequence[int]) -> None:
        table.extend([None] * (max(ids) + 1 - len(table)))
        new = sorted({token_id for token_id in ids if table[token_id] is None})
        for token_id, token in zip(new, self._tokenizer.convert_ids_to_tokens(new), strict=True):
            table[token_id] = self._added[token_id].encode() if token_id in self._added else _bytes(token or "", kind)

    def _differs(self, text: str, ids: Sequence[int], where: str) -> bool:
        letters, boundaries = _folded(text)
        for kind in (0, 1) if self._kind == 0 else (1, 0):
            if _says(self._joined(kind, ids).decode(errors="replace"), letters, boundaries):
                self._kind = kind
                return False
        said = str(self._tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))
        if _says(said, letters, boundaries):
            return False
        again = self._tokenizer(said, add_special_tokens=False, verbose=False)["input_ids"]
        # If the decoded text encodes to other ids, the decoder is missing or wrong, and its text cannot be used.
        consistent = list(again) == list(ids)
        if consistent and 2 * len(_SPACES.findall(said)) < len(_SPACES.findall(text)):
            raise TokenizationError(
                f"{where}: the tokenizer drops white space: {_shown(text)} becomes {_shown(said)}. Its settings do "
                'not match its vocabulary. Copy the tokenizer again, or set "tokenizer_class" in '
                'tokenizer_config.json to "PreTrainedTokenizerFast" if the model has its own tokenizer.json.'
            )
        if self._backend is None or _folded(said)[0] == letters:
            return consistent
        return self._uncovered(text, self._backend)

    def _uncovered(self, text: str, backend: TokenizerBackend) -> bool:
        """Return whether visible characters have no token."""
        covered = bytearray(len(text))
        for start, end in backend.encode(text, add_special_tokens=False).offsets:
            covered[start:end] = b"\1" * (end - start)
        return any(not covered[i] and _is_seen(c) for i, c in enumerate(text))


def _bytes(token: str, kind: int) -> bytes:
    if kind == 0:
        try:
            return bytes(map(_BYTES.__getitem__, token))
        except KeyError:
            return token.encode()
    byte = _BYTE_TOKEN.fullmatch(token)
    return bytes([int(byte[1], 16)]) if byte else token.replace(_SPACE, " ").encode()


def _shown(text: str) -> str:
    return repr(text[-60:])


def _is_seen(character: str) -> bool:
    return unicodedata.category(character)[0] in "LNPS"


def _says(decoded: str, letters: str, boundaries: set[int]) -> bool:
    """Return whether a decoded text has these characters, and white space at least at these boundaries."""
    found, spaces = _folded(decoded, everywhere=True)
    return found == letters and boundaries <= spaces


def _is_word(character: str) -> bool:
    """Return whether white space next to a character separates words; Chinese and Japanese are written without it."""
    return character.isalnum() and character < "\u2e80"


def _folded(text: str, *, everywhere: bool = False) -> tuple[str, set[int]]:
    """Return a text without case, accents and white space, and the positions where white space separates two words.

    Args:
        everywhere: also return white space next to other characters (which special tokens may remove).
    """
    if not text.isascii():
        kept = (c for c in unicodedata.normalize("NFKD", text) if c.isspace() or unicodedata.category(c)[0] in "LNPS")
        text = "".join(kept)
    parts = text.casefold().split()
    boundaries, length = set(), 0
    for part, following in itertools.pairwise([*parts, "."]):
        length += len(part)
        if everywhere or (_is_word(part[-1]) and _is_word(following[0])):
            boundaries.add(length)
    return "".join(parts), boundaries
