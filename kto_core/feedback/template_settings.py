"""Set the variables of a chat template: those that users may set, defaults for them, and settings to try."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence

# Parameters of `apply_chat_template` that a record must not set: it could bring its own template, which no fingerprint
# covers, or change what is rendered.
NOT_FOR_DATA = {
    "conversation",
    "messages",
    "tools",
    "chat_template",
    "add_generation_prompt",
    "continue_final_message",
    "tokenize",
    "padding",
    "truncation",
    "max_length",
    "return_tensors",
    "return_dict",
    "return_assistant_tokens_mask",
    "tokenizer_kwargs",
    "processor_kwargs",
    "sanitize_control_tokens",
    "strftime_now",
    "kto_dates",
}

_KNOWN_SWITCHES = ("enable_thinking", "thinking", "truncate_history_thinking", "clear_thinking", "preserve_thinking")
_CONDITION = re.compile(r"\b(?:if|elif|and|or|not)\s+\(?(?:not\s+)?([a-z_]+)\b(?!\s*[.(\[])")
_NO_SWITCHES = {
    *NOT_FOR_DATA,
    *(
        "not",
        "is",
        "in",
        "and",
        "or",
        "message",
        "loop",
        "documents",
        "true",
        "false",
        "none",
        "bos_token",
        "eos_token",
    ),
}
_MOST_SWITCHES = 20


def with_settings(template: str | Mapping[str, str], settings: Mapping[str, object]) -> str | dict[str, str]:
    """Return a chat template that begins by setting defaults for some of its variables.

    Every program that renders with it, such as `generate` and servers, uses these defaults unless the caller sets
    the variables.

    Args:
        template: Jinja, or several templates by name.
        settings: JSON values.
    """
    if isinstance(template, Mapping):
        return {name: _with_settings(one, settings) for name, one in template.items()}
    return _with_settings(template, settings)


def _with_settings(template: str, settings: Mapping[str, object]) -> str:
    lines = [
        # `trim_blocks` removes one line break after each block.
        f"{{% if {name} is not defined %}}{{% set {name} = {_literal(value)} %}}{{% endif %}}\n"
        for name, value in sorted(settings.items())
    ]
    return "".join(lines) + template


def _literal(value: object) -> str:
    """Return a JSON value as a Jinja literal."""
    if value is None or isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_literal(str(key))}: {_literal(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_literal, value)) + "]"
    return json.dumps(value)


def unread(template: str | Mapping[str, str] | None, names: Sequence[str]) -> list[str]:
    """Return the names that do not occur in the template."""
    source = template if isinstance(template, str) else "\n".join(map(str, (template or {}).values()))
    return [name for name in names if name not in source]


def switches(source: str) -> Iterator[dict[str, bool]]:
    """Yield settings of a template to try: variables that the template's conditions read, false and true, singly and in pairs."""
    names = [name for name in _KNOWN_SWITCHES if name in source]
    found = dict.fromkeys(_CONDITION.findall(source))
    names += [name for name in found if name not in (*names, *_NO_SWITCHES) and f"set {name}" not in source]
    single = [{name: value} for name in names[:_MOST_SWITCHES] for value in (False, True)]
    yield from single
    for i, one in enumerate(single[:8]):
        for other in single[i + 1 : 8]:
            if one.keys() != other.keys():
                yield {**one, **other}
