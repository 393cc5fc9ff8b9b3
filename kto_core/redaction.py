"""Detect secrets, and remove them from texts and tables.

All output passes through here: error messages, URLs, config.yaml, sweep.yaml, run.json and reports. A secret is
recognised by its place in a URL (`scheme://user:secret@host`, `?token=secret`), by the name of its entry (`hub_token`,
`api_key`, `password`), or by the form of a known service's tokens.
"""

import functools
import re
from collections.abc import Iterable, Mapping
from typing import Any
from urllib.parse import unquote

HIDDEN = "***"

# `max_tokens`, `tokenizer` and `tokens_seen` are settings, `hub_token` and `hub_tokens` are not.
_SECRET_NAME = re.compile(
    r"token(?!s|i[sz])|(?:api|access|auth|bearer|hub|hf|refresh)\w{0,20}tokens|key(?!s|word|_?value|board)|api[_-]?keys"
    r"|secret|passw|passphrase|pwd|credential|(?<![a-z])auth(?!or(?!iz|is))|bearer|cookie|(?<![a-z])(?:pass|pw|sas|jwt|dsn)(?![a-z])|webhook|session[_-]?(?:id|token|key|cookie)|signature|(?<![a-z])sig(?![a-z])|odbc_connect",
    re.IGNORECASE,
)
_TOKEN = re.compile(
    r"\b(?:(?:hf|api_org|gh[pousr]|github_pat)_[A-Za-z0-9_]{30,}|sk-[\w-]{30,}|glpat-[\w-]{20,}|xox[a-z]-[\w-]{20,}"
    r"|AKIA[0-9A-Z]{16}\b|eyJ[\w-]{10,}\.eyJ[\w-]{10,}\.[\w-]+)"
)
# An HTTP header, as clients quote it.
_HEADER = re.compile(
    r"(authorization['\"]?\s*[:=]\s*['\"]?(?:bearer|basic|token)?\s*|\bbearer\s+)[\w.~+/=-]{16,}", re.IGNORECASE
)

# One slash is enough, because `Path` merges two.
_URL = re.compile(r"[A-Za-z][\w+.-]*:/+[^\s'\"<>]*")
_CHAINED = re.compile(r"::(?=[A-Za-z][\w+.-]*:)")
# Not s3://bucket/key=5/: folders of a partitioned table.
_SETTING = re.compile(r"(?<![/\w.-])([\w.-]+)=([^&;,\s'\"#)]+)")
_ENTRY = re.compile(r"""(['"])([\w.-]+)\1(\s*:\s*)(['"])(.+?)\4""")

_HAVE_PORTS = ("http", "https", "webdav", "webdavs", "sftp", "ssh", "ftp", "hdfs", "webhdfs", "smb")

# Schemes where a name without a password before the @ is a token (https://ghp_...@github.com). Elsewhere it is a user,
# or a container (abfs://container@account.dfs.core.windows.net/folder).
_NAMES_TOKEN = ("http", "https", "webdav", "webdavs", "git", "github", "hf", "s3", "s3a", "gs", "gcs")


@functools.lru_cache(maxsize=1024)
def is_secret_name(name: str) -> bool:
    """Return whether an entry of this name is a secret."""
    return _SECRET_NAME.search(name) is not None


def is_secret(name: str, value: object) -> bool:
    """Return whether an entry is a secret. Booleans and ids (`pad_token_id: 0`) never do, whatever their names."""
    if value is None or isinstance(value, bool) or value == "" or (isinstance(value, int) and name.endswith("_id")):
        return False
    return is_secret_name(name)


def hidden(text: str, known: Iterable[str] = ()) -> str:
    """Return a text with `***` in place of every secret.

    Args:
        known: secrets that a library may quote outside a URL.
    """
    for secret in sorted(filter(None, known), key=len, reverse=True):
        text = text.replace(secret, HIDDEN)
    if "@" in text:
        text = _URL.sub(lambda found: hidden_url(found[0]), text)
    text = _ENTRY.sub(lambda it: it[0].replace(it[5], HIDDEN) if is_secret_name(it[2]) else it[0], text)
    return _TOKEN.sub(HIDDEN, _HEADER.sub(rf"\1{HIDDEN}", _without_settings(text)))


def hidden_url(url: str) -> str:
    """Return a URL with `***` in place of the password and of secret query entries."""
    parts = []
    for scheme, login, rest in map(_split, _chain(url)):
        name, colon, _ = login.partition(":")
        shown = f"{name}:{HIDDEN}@" if colon else f"{HIDDEN}@" if login else ""
        parts.append(scheme + shown + rest)
    return _without_settings("::".join(parts))


def bare_url(url: str) -> str:
    """Return a URL without its login and its query."""
    return "::".join(scheme + re.split(r"[?#]", rest)[0] for scheme, _, rest in map(_split, _chain(url)))


def has_credentials(url: str) -> bool:
    """Return whether a folder's URL, or one chained in it, has a login, a password or a query."""
    parts = [
        (login, re.split(r"[?#]", rest, maxsplit=1)[1:], "?" in rest) for _, login, rest in map(_split, _chain(url))
    ]
    return any(
        login or query or _without_settings("".join(behind)) != "".join(behind) for login, behind, query in parts
    )


def secrets_of(url: str) -> set[str]:
    """Return the secrets in a database's URL, both as written and decoded."""
    found = {login.partition(":")[2] for _, login, _ in map(_split, _chain(url))}
    found |= {value for name, value in _SETTING.findall(url) if is_secret_name(name)}
    # A shorter text would occur in ordinary words of a message.
    return {form for secret in found for form in (secret, unquote(secret)) if len(form) > 2}


def without_secrets(value: object) -> Any:
    """Return data without its secrets: secret entries are removed, and texts are `hidden`."""
    if isinstance(value, Mapping):
        return {key: without_secrets(one) for key, one in value.items() if not is_secret(str(key), one)}
    if isinstance(value, list | tuple):
        return [without_secrets(one) for one in value]
    return hidden(value) if isinstance(value, str) else value


def secret_names(value: object, above: str = "") -> list[str]:
    """Return the dotted names of the entries that `without_secrets` removes."""
    if isinstance(value, list | tuple):
        return [name for one in value for name in secret_names(one, above)]
    if not isinstance(value, Mapping):
        return []
    found = []
    for key, one in value.items():
        name = f"{above}.{key}" if above else str(key)
        found += [name] if is_secret(str(key), one) else secret_names(one, name)
    return found


def _without_settings(text: str) -> str:
    return _SETTING.sub(lambda it: f"{it[1]}={HIDDEN}" if is_secret_name(it[1]) else it[0], text)


def _chain(url: str) -> list[str]:
    """Return the parts of `simplecache::s3://bucket/folder`."""
    return _CHAINED.split(url)


def _split(url: str) -> tuple[str, str, str]:
    """Return the scheme with its slashes, the login if it contains a secret, and the rest.

    A password may contain any character, including a slash and an @, so the login ends at the last @. If a path begins
    before the colon, there is no login.
    """
    found = re.match(r"[A-Za-z][\w+.-]*:/+", url)
    scheme = found[0] if found else ""
    rest = url[len(scheme) :]
    kind = scheme.partition(":")[0].lower()
    before, at, behind = rest.rpartition("@")
    name, colon, password = before.partition(":")
    if not at or re.search(r"[/?#]", name):  # hf://datasets/me/refs@main
        return scheme, "", rest
    if colon and kind in _HAVE_PORTS and re.match(r"\d{1,5}/", password):  # http://host:8080/me@home
        return scheme, "", rest
    if not colon and kind not in _NAMES_TOKEN:
        return scheme, "", rest
    return scheme, before, behind
