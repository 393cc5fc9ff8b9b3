"""Read files by the column names in `dataset_info.json`, LLaMA-Factory's registry, in the same folder or the one above.

    {"thumbs": {"file_name": "thumbs.json", "formatting": "sharegpt", "ranking": false,
                "columns": {"messages": "turns", "kto_tag": "good"},
                "tags": {"role_tag": "who", "content_tag": "text", "user_tag": "me", "assistant_tag": "it"}}}

If `columns` are given, only these are read, as in LLaMA-Factory; labels keep their usual names.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from offline_kto.kto_core.errors import ConfigError
from offline_kto.kto_core.feedback.columns import COLUMNS
from offline_kto.kto_core.feedback.quoting import quoted

# LLaMA-Factory's names of columns, and those of a record here, in its two forms.
_SHARED = {name: name for name in ("system", "tools", "chosen", "rejected", "kto_tag", "images", "videos", "audios")}
_ALPACA = {"prompt": "instruction", "query": "input", "response": "output", "history": "history", **_SHARED}
_SHAREGPT = {"messages": "conversations", **_SHARED}
# Columns that are read under these names even where `columns` does not list them.
_NEEDED = ("prompt", "response", "messages")
# Columns of a record that are kept even if they are not mapped.
_LABELS = ("label", "kto_tag", "rating")
_ROLES: Final = {
    "user_tag": ("human", "user"),
    "assistant_tag": ("gpt", "assistant"),
    "observation_tag": ("observation", "tool"),
    "function_tag": ("function_call", "function_call"),
    "system_tag": ("system", "system"),
}


@dataclass(frozen=True)
class DatasetInfo:
    """An entry of `dataset_info.json`.

    Attributes:
        name: of the data set.
        columns: the file's column for each of a record's.
        roles: the usual role for each of the file's; None if it has no conversations.
        role_tag, content_tag: keys of a message.
    """

    name: str
    columns: Mapping[str, str]
    roles: Mapping[str, str] | None
    role_tag: str
    content_tag: str

    def record(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Return a record with the usual names. Columns that have no usual name are kept."""
        kept = {key: value for key, value in given.items() if key not in COLUMNS or key in _LABELS}
        mapped = {name: given[column] for name, column in self.columns.items() if column in given}
        if self.roles is not None:
            for name in ("conversations", "chosen", "rejected"):
                if name in mapped:
                    mapped[name] = self._messages(mapped[name])
        if "kto_tag" in mapped:
            kept = {key: value for key, value in kept.items() if key not in _LABELS}
        return {**kept, **mapped}

    def _messages(self, value: Any) -> Any:
        """Return messages with the usual keys and roles; other values are returned unchanged and refused later."""
        if isinstance(value, str):
            try:
                value = json.loads(value)
            except ValueError:
                return value
        if isinstance(value, Mapping):
            return self._message(value)
        return [self._message(one) for one in value] if isinstance(value, list) else value

    def _message(self, message: Any) -> Any:
        if not isinstance(message, Mapping) or self.role_tag not in message:
            return message
        assert self.roles is not None
        role = message[self.role_tag]
        rest = {key: value for key, value in message.items() if key not in (self.role_tag, self.content_tag)}
        named = self.roles.get(role, role) if isinstance(role, str) else role
        return {**rest, "role": named, "content": message.get(self.content_tag)}


def entry_for(file_name: str, table: object, source: str) -> DatasetInfo | None:
    """Return the entry about a file; None if it is not listed.

    Args:
        file_name: of the file, relative to the registry's folder. An entry may also name the folder that contains it.
        table: the content of `dataset_info.json`.
        source: its path, for errors.

    Raises:
        ConfigError: an entry that cannot be read, or several about this file.
    """
    if not isinstance(table, Mapping):
        return None
    named = {
        name: entry
        for name, entry in table.items()
        if isinstance(entry, Mapping) and entry.get("file_name") in (file_name, *_folders(file_name))
    }
    if len(named) > 1:
        raise ConfigError(
            f"{source}: {' and '.join(map(quoted, named))} describe {file_name}. Keep one of them, or name the columns with "
            "options such as --prompt-field."
        )
    for name, entry in named.items():
        return _entry(str(name), entry, f"{source}: {name}")
    return None


def _folders(file_name: str) -> tuple[str, ...]:
    """Return the names of the folder of a file; none if it is beside the registry."""
    folder, _, _ = file_name.rpartition("/")
    return (folder, f"{folder}/") if folder else ()


def _entry(name: str, entry: Mapping[str, Any], source: str) -> DatasetInfo:
    formatting = entry.get("formatting", "alpaca")
    if formatting not in ("alpaca", "sharegpt", "openai"):
        raise ConfigError(f'{source}: formatting: "alpaca" or "sharegpt", got {quoted(formatting)}.')
    conversations = formatting != "alpaca"
    names = _SHAREGPT if conversations else _ALPACA
    columns = _texts(entry, "columns", source)
    unknown = [one for one in columns if one not in {**_ALPACA, **_SHAREGPT}]
    if unknown:
        raise ConfigError(f"{source}: columns: unknown name {quoted(unknown[0])}; known are {', '.join(names)}.")
    tags = _texts(entry, "tags", source)
    openai = formatting == "openai"
    usual = {theirs: ours for theirs, ours in names.items() if not columns or theirs in _NEEDED}
    return DatasetInfo(
        name=name,
        columns={ours: column for theirs, ours in names.items() if (column := columns.get(theirs, usual.get(theirs)))},
        roles={tags.get(tag, role if openai else theirs): role for tag, (theirs, role) in _ROLES.items()}
        if conversations
        else None,
        role_tag=tags.get("role_tag", "role" if openai else "from"),
        content_tag=tags.get("content_tag", "content" if openai else "value"),
    )


def _texts(entry: Mapping[str, Any], key: str, source: str) -> dict[str, str]:
    value = entry.get(key) or {}
    if not isinstance(value, Mapping) or not all(isinstance(one, str) for one in value.values()):
        raise ConfigError(f"{source}: {key}: must map names to texts, got {quoted(value)}.")
    return {str(name): str(one) for name, one in value.items()}
