"""Load a tokenizer so that it tokenizes as its tokenizer.json specifies."""

import contextlib
import json
import logging
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from offline_kto.kto_core.errors import ConfigError, ModelError, in_one_line, printable, said_by
from offline_kto.kto_core.feedback.template_settings import unread, with_settings
from offline_kto.kto_core.library_types import Model, Tokenizer, TokenizerBackend, Transformers

_FILE = "tokenizer.json"


def load_tokenizer(
    auto_tokenizer: Transformers,
    folder: Path,
    *,
    trust_remote_code: bool,
    options: Mapping[str, object] | None = None,
    notes: list[str] | None = None,
) -> Tokenizer:
    """Load the tokenizer in a model folder.

    Args:
        auto_tokenizer: `transformers.AutoTokenizer`.
        folder: local.
        options: more keywords for `from_pretrained`.
        notes: list to which messages for the user are added.

    Raises:
        ModelError: the folder has no tokenizer that can be loaded.
    """
    keywords = {**(options or {}), "trust_remote_code": trust_remote_code}
    with _captured_warnings() as heard:
        tokenizer = _load(auto_tokenizer, folder, keywords)
        if _stop_sampling(getattr(tokenizer, "backend_tokenizer", None)):
            heard.append(
                f"{folder}: {_FILE} drops merges at random (BPE-dropout), so tokenization is not deterministic. "
                "The dropout is switched off, also in the tokenizer saved with the trained model."
            )
        if other := _as_filed(tokenizer, folder, keywords):
            name = type(tokenizer).__name__
            heard.append(
                f"{folder}: transformers' {name} tokenizes differently from {_FILE}. {_FILE} is used, and saved with the "
                "trained model."
            )
            tokenizer = other
    if notes is not None:
        notes += [_rewrite_warning(text, folder) for text in dict.fromkeys(heard)]
    return tokenizer


def _stop_sampling(backend: TokenizerBackend) -> bool:
    """Switch off random merges (BPE-dropout) in a `tokenizers` tokenizer. Return whether they were on."""
    model: Model = getattr(backend, "model", None)
    if not getattr(model, "dropout", None):
        return False
    model.dropout = None
    return True


def use_template(tokenizer: Tokenizer, path: Path | None, settings: Mapping[str, object]) -> list[str]:
    """Set a tokenizer's chat template from a file, or set defaults for the variables of its own template.

    Returns:
        Messages for the user.

    Raises:
        ConfigError: a file that cannot be read, or variables without a template.
    """
    template = _read_template(path) if path is not None else getattr(tokenizer, "chat_template", None)
    if not template:
        raise ConfigError(
            "--chat-template-kwargs: the tokenizer has no chat template. Pass one with --chat-template FILE."
        )
    tokenizer.chat_template = with_settings(template, settings)
    return [
        f"--chat-template-kwargs {name}: the chat template has no such variable."
        for name in unread(template, [*settings])
    ]


def _read_template(path: Path) -> str:
    try:
        if path.stat().st_size > _LARGEST_TEMPLATE:
            raise ConfigError(f"--chat-template {path}: too large for a chat template.")
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--chat-template {path}: cannot be read ({said_by(error)}).") from error
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        content = None
    if isinstance(content, dict) and isinstance(content.get("chat_template"), str):  # chat_template.json
        text = content["chat_template"]
    if not text.strip():
        raise ConfigError(f"--chat-template {path}: is empty.")
    return text


_LARGEST_TEMPLATE = 1 << 20


def _load(tokenizer_class: Transformers, folder: Path, keywords: Mapping[str, object]) -> Tokenizer:
    try:
        return tokenizer_class.from_pretrained(str(folder), **keywords)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # panics of native code are not an `Exception`
        filed = (folder / _FILE).is_file()
        hint = (
            f' Set "tokenizer_class" in tokenizer_config.json to "PreTrainedTokenizerFast" to read {_FILE} unchanged.'
        )
        raise ModelError(
            f"{folder}: its tokenizer cannot be loaded: {in_one_line(error)}{'.' + hint if filed else ''}"
        ) from error


def _as_filed(tokenizer: Tokenizer, folder: Path, keywords: Mapping[str, object]) -> Tokenizer:
    """Return the tokenizer that tokenizer.json describes if it tokenizes differently; None otherwise.

    Some classes keep the file's vocabulary but replace its rules with their own: a byte-level file under
    `LlamaTokenizer` loses every space.
    """
    path = folder / _FILE
    plain = next((base for base in type(tokenizer).__mro__ if base.__name__ == "TokenizersBackend"), None)
    if plain is None or type(tokenizer) is plain or not path.is_file():
        return None
    from tokenizers import Tokenizer

    try:
        filed = Tokenizer.from_file(str(path))
        filed.no_truncation()
        filed.no_padding()
        _stop_sampling(filed)
        probe = _probe(filed)
        wanted = filed.encode(probe, add_special_tokens=False).ids
        if _alike(_ids(tokenizer, probe), wanted):
            return None
        other = _load(plain, folder, keywords)
        _stop_sampling(other.backend_tokenizer)
        return other if _alike(_ids(other, probe), wanted) else None
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException:  # noqa: BLE001 - a failure here recurs on the first row, with an error that names it
        return None


def _ids(tokenizer: Tokenizer, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def _alike(ids: list[int], wanted: list[int]) -> bool:
    """Return whether two lists of ids are the same except at their beginning.

    Whether a text, or a part after a special token, begins with a space depends on `add_prefix_space` and `legacy` in
    tokenizer_config.json.
    """
    same = next(
        (i for i, (a, b) in enumerate(zip(reversed(ids), reversed(wanted), strict=False)) if a != b), len(wanted)
    )
    return len(wanted) - same <= _BEGINNING and len(ids) - same <= _BEGINNING


_BEGINNING = 4
_TEXT = (
    "a\n\nIt's the dog's BONE, isn't it? don't DON'T camelCaseWords snake_case\n\tif x1 == 1234567.89:  # 50% of 3,000\n"
    "    return [y**2 for y in range(10)]\r\n\r\n  two  spaces   three.  \u00c4rger na\u00efve caf\u00e9 \u20ac5 \u4f60\u597d\uff0c"
    "\u4e16\u754c \u0939\u093f\u0928\u094d\u0926\u0940 cafe\u0301s "
    "\u041f\u0440\u0438\u0432\u0435\u0442 \u0645\u0631\u062d\u0628\u0627 \ud55c\uad6d\uc5b4 \U0001f600\U0001f44d "
    "https://example.org/a?b=c&d=e ... !!! (a)[b]{c}<d> x=-1 1st 2nd\n"
)
_PIECES = 1000


def _probe(tokenizer: Tokenizer) -> str:
    """Return text that exercises a tokenizer's rules: characters of all kinds, and pieces of its own vocabulary."""
    size = tokenizer.get_vocab_size(with_added_tokens=False)
    added = tokenizer.get_added_tokens_decoder()
    ids = [i for i in range(0, size, max(1, size // _PIECES)) if i not in added]
    pieces = [tokenizer.decode([i]) for i in ids]
    pieces = [piece for piece in pieces if piece.strip() and piece.isprintable() and "\ufffd" not in piece]
    return _TEXT + " ".join(pieces) + "\n" + "".join(pieces)


@contextlib.contextmanager
def _captured_warnings() -> Iterator[list[str]]:
    """Collect warnings that transformers logs, which the commands hide."""
    heard: list[str] = []

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            heard.append(record.getMessage())

    logger, listener = logging.getLogger("transformers"), Listener(logging.WARNING)
    level, handlers, logger.handlers = logger.level, logger.handlers, [listener]
    logger.setLevel(logging.WARNING)
    try:
        yield heard
    finally:
        logger.setLevel(level)
        logger.handlers = handlers


def _rewrite_warning(text: str, folder: Path) -> str:
    if "fix_mistral_regex" in text:
        return (
            f"{folder}: transformers reports that the pre-tokenization regex in its tokenizer.json is Mistral's faulty one, "
            "so that the tokens are not the ones that the model was trained on. Load it with --tokenizer-kwargs "
            "fix_mistral_regex=true, or keep it with fix_mistral_regex=false."
        )
    return printable(re.sub(r"\s+", " ", text), 400)
