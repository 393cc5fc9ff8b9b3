"""Convert prompts and completions of every supported feedback format to one.

    str | list of messages | ShareGPT turns | Alpaca columns  ->  str, or a tuple of messages

Labels and options are handled in offline_kto.kto_core.feedback.records. No function changes the record it is given.
Invalid input raises FeedbackError with the location, the value that was found and what to write instead.
"""

import copy
import json
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from offline_kto.kto_core.errors import FeedbackError, printable

# {"role": str, "content": str, ...}; other keys, such as tool_calls or name, are kept.
# A message may have any keys that its chat template reads; its `role` and `content` are strings.
Message: TypeAlias = dict[str, Any]
Turns: TypeAlias = str | tuple[Message, ...]

EMPTY_ANSWER = "An empty answer is not feedback: remove the row."

HUMAN_TURN = "\n\nHuman:"
ASSISTANT_TURN = "\n\nAssistant:"

# Role names of ShareGPT files. Any other name is kept: the chat template decides which roles are valid.
SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "model": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
}


def quoted(value: object, limit: int = 60) -> str:
    """Return `value` as JSON on one line, with unprintable characters escaped, cut to about `limit` characters."""
    try:
        text = json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError):
        text = f"a value of type {type(value).__name__}"
    return printable(text, limit)


def as_turns(value: object, where: str, field: str) -> Turns:
    """Return text unchanged, and a list of messages or a single message as a tuple of messages.

    A message needs a role (a string; unknown ones are kept) and a content (a string, or a list of text parts,
    which are joined). ShareGPT's `from` and `value` are accepted in their place. Keys whose value is None are
    left out: Parquet stores None for a key that only other rows have.

    Raises:
        FeedbackError: neither text nor messages, an empty list, no role, no content, images or sound.
    """
    if isinstance(value, str):
        return value
    sharegpt = field == "conversations"
    if isinstance(value, Mapping):
        return (_message(value, where, f"'{field}'", sharegpt=sharegpt),)
    if not isinstance(value, list | tuple):
        raise FeedbackError(f"{where}: '{field}' must be text or a list of messages, got {quoted(value)}.")
    if len(value) == 0:
        raise FeedbackError(f"{where}: '{field}' is an empty list. Give it a message, or remove the row.")
    return tuple(
        _message(item, where, f"message {number} of '{field}'", sharegpt=sharegpt)
        for number, item in enumerate(value, 1)
    )


def as_conversation(value: object, where: str, field: str) -> tuple[Message, ...]:
    """Convert like `as_turns`, but refuse text, for columns such as `messages`."""
    turns = as_turns(value, where, field)
    if isinstance(turns, str):
        raise FeedbackError(f"{where}: '{field}' must be a list of messages, got the text {quoted(turns)}.")
    return turns


def _message(value: object, where: str, what: str, *, sharegpt: bool) -> Message:
    if not isinstance(value, Mapping):
        raise FeedbackError(
            f'{where}: {what} must look like {{"role": "user", "content": "..."}}, got {quoted(value)}.'
        )
    given = {key: item for key, item in value.items() if item is not None}
    # Each key is looked up separately, so that a message may have `from` and `content`.
    role_key = "from" if "role" not in given and "from" in given else "role"
    content_key = "value" if "content" not in given and "value" in given else "content"
    role = given.pop(role_key, None)
    if not isinstance(role, str):
        raise FeedbackError(f"{where}: {what} needs a 'role' that is a string, got {quoted(role)}.")
    if sharegpt or role_key == "from":
        role = SHAREGPT_ROLES.get(role.strip().lower(), role)
    if content_key in given:
        content = _content(given.pop(content_key), where, what)
    elif _has_tool_calls(given):
        content = ""  # a tool call without text: files have null here, templates expect a string
    else:
        raise FeedbackError(f"{where}: {what} has no 'content'. Give it a string.")
    return {"role": role, "content": content, **copy.deepcopy(given)}


def _content(value: object, where: str, what: str) -> str:
    if isinstance(value, str):
        return value
    if not isinstance(value, list | tuple):
        raise FeedbackError(f"{where}: the 'content' of {what} must be a string, got {quoted(value)}.")
    texts: list[str] = []
    for part in value:
        text = part.get("text") if isinstance(part, Mapping) and part.get("type") == "text" else None
        if not isinstance(text, str):
            raise FeedbackError(
                f"{where}: {what} contains {quoted(part)}. Multimodal feedback is not supported: give text,"
                ' or parts like {"type": "text", "text": "..."}.'
            )
        texts.append(text)
    return "".join(texts)


def _has_tool_calls(message: Mapping[str, object]) -> bool:
    calls = message.get("tool_calls")
    return isinstance(calls, list | tuple) and len(calls) > 0


def check_completion(completion: Turns, where: str, field: str) -> None:
    """Check that a completion is not empty, and that its first and last messages are the assistant's.

    Tool messages may come between them. An assistant's message with tool_calls may have no text.

    Raises:
        FeedbackError: it is empty or blank, or has messages of other roles.
    """
    if isinstance(completion, str):
        if completion.strip() == "":
            raise FeedbackError(f"{where}: '{field}' is empty. {EMPTY_ANSWER}")
        return
    for index, message in enumerate(completion):
        role = message["role"]
        outer = index in (0, len(completion) - 1)
        if role in ("user", "system", "developer") or (outer and role != "assistant"):
            raise FeedbackError(
                f"{where}: '{field}' must contain only the assistant's messages, but message {index + 1} has the role"
                f" {quoted(role)}. Move it to the prompt, or remove the row."
            )
        if role == "assistant" and message["content"].strip() == "" and not _has_tool_calls(message):
            raise FeedbackError(f"{where}: the assistant's message in '{field}' is empty. {EMPTY_ANSWER}")


def split_conversation(
    messages: tuple[Message, ...], where: str, field: str
) -> tuple[tuple[Message, ...], tuple[Message, ...]]:
    """Return (all but the last message, the last message). The last one must be the assistant's.

    Raises:
        FeedbackError: the last message has another role, or is the only one.
    """
    if messages[-1]["role"] != "assistant":
        raise FeedbackError(
            f"{where}: the last message of '{field}' is the completion, which the label rates, and must have the role"
            f' "assistant", got {quoted(messages[-1]["role"])}. Remove the messages after the completion, or remove the row.'
        )
    if len(messages) == 1:
        raise FeedbackError(f"{where}: '{field}' contains only an answer. Put the question before it.")
    return messages[:-1], messages[-1:]


def join_sides(prompt: Turns, answers: Sequence[tuple[str, Turns]], where: str) -> tuple[Turns, tuple[Turns, ...]]:
    """Return one prompt and its completions, all as text or all as messages; `answers` are (column, value).

    If one side is a conversation, text on the other side becomes a user's or an assistant's message. If an answer
    is a whole conversation, the prompt is removed from it:

        prompt messages   the conversation must begin with them
        prompt text       the completion is what follows the last message that is neither the assistant's nor
                          a tool's; before it one of the user's messages must be the prompt

    Answers that are text are never cut: they may repeat the question.

    Raises:
        FeedbackError: a conversation that does not repeat the prompt, or answers to different prompts.
    """
    if isinstance(prompt, str) and all(isinstance(answer, str) for _, answer in answers):
        return prompt, tuple(answer for _, answer in answers)
    pairs = [_cut_prompt(prompt, answer, where, field) for field, answer in answers]
    prompts = [begin for begin, _ in pairs]
    if any(begin != prompts[0] for begin in prompts):
        raise FeedbackError(f"{where}: 'chosen' and 'rejected' answer different prompts. Let both answer the same one.")
    return prompts[0], tuple(completion for _, completion in pairs)


def _cut_prompt(
    prompt: Turns, answer: Turns, where: str, field: str
) -> tuple[tuple[Message, ...], tuple[Message, ...]]:
    asked = _said("user", prompt) if isinstance(prompt, str) else prompt
    said = _said("assistant", answer) if isinstance(answer, str) else answer
    others = [index for index, m in enumerate(said) if m["role"] not in ("assistant", "tool")]
    size = len(asked)
    repeats = said[:size] == asked
    if not repeats and len(others) == 0:
        return asked, said
    if isinstance(prompt, str) and len(others) > 0:
        size = others[-1] + 1
        repeats = any(m["role"] == "user" and m["content"].strip() == prompt.strip() for m in said[:size])
    if not repeats:
        raise FeedbackError(
            f"{where}: '{field}' is a conversation that does not repeat the prompt. Let it begin with the"
            " prompt's messages, or contain the assistant's answer alone."
        )
    if size == len(said):
        raise FeedbackError(f"{where}: '{field}' repeats the prompt and has no answer. Remove the row.")
    return said[:size], said[size:]


def _said(role: str, text: str) -> tuple[Message, ...]:
    return ({"role": role, "content": text},)


def shared_beginning(chosen: Turns, rejected: Turns, where: str) -> tuple[Turns, tuple[Turns, Turns]]:
    r"""Return (prompt, (chosen, rejected)) of a pair without a prompt column.

    Messages: the prompt is the longest common beginning, and one assistant's message must remain on each side.
    Text: the prompt ends with the last "\n\nAssistant:" that both share, and no "\n\nHuman:" may follow.

    Raises:
        FeedbackError: nothing is shared, more than one answer remains, or only one side is text.
    """
    if isinstance(chosen, str) and isinstance(rejected, str):
        size = _shared_text(chosen, rejected, where)
        return chosen[:size], (chosen[size:], rejected[size:])
    if isinstance(chosen, str) or isinstance(rejected, str):
        raise FeedbackError(
            f"{where}: one of 'chosen' and 'rejected' is text and the other is messages, and there is no 'prompt'."
            " Write both in the same form, or add a prompt."
        )
    size = _shared_messages(chosen, rejected, where)
    return chosen[:size], (chosen[size:], rejected[size:])


def _shared_messages(chosen: tuple[Message, ...], rejected: tuple[Message, ...], where: str) -> int:
    size = 0
    while size < min(len(chosen), len(rejected)) - 1 and chosen[size] == rejected[size]:
        size += 1
    if size == 0:
        raise FeedbackError(
            f"{where}: 'chosen' and 'rejected' share no beginning, and there is no 'prompt'. Add a prompt, or"
            " begin both with the messages they answer."
        )
    for field, side in (("chosen", chosen), ("rejected", rejected)):
        rest = [message["role"] for message in side[size:]]
        if rest != ["assistant"]:
            raise FeedbackError(
                f"{where}: after the {size} messages that 'chosen' and 'rejected' share, '{field}' must contain"
                f" one message of the assistant, got the roles {quoted(rest)}. Cut both after that answer."
            )
    return size


def _shared_text(chosen: str, rejected: str, where: str) -> int:
    size = 0
    while (marker := chosen.find(ASSISTANT_TURN, size)) >= 0:
        end = marker + len(ASSISTANT_TURN)
        if not rejected.startswith(chosen[size:end], size):
            break
        size = end
    if size == 0:
        raise FeedbackError(
            f"{where}: 'chosen' and 'rejected' share no turn that begins with an empty line and 'Assistant:',"
            " and there is no 'prompt'. Add a prompt."
        )
    for field, side in (("chosen", chosen), ("rejected", rejected)):
        if HUMAN_TURN in side[size:]:
            raise FeedbackError(
                f"{where}: 'chosen' and 'rejected' differ before their last answer: '{field}' continues with"
                " another 'Human:' turn. Cut both after the first answer that differs, or remove the row."
            )
    return size


def alpaca_prompt(record: Mapping[str, object], where: str, *, conversation: bool) -> Turns:
    r"""Return the prompt of a record with `instruction` and optionally `input`, `system` and `history`.

    conversation:  system, the history's questions and answers, then user: instruction + "\n" + input
    plain text:    the same texts in the same order, an empty line between any two

    LLaMA-Factory converts such a row to the same conversation. Empty texts are skipped.

    Raises:
        FeedbackError: a text that is not a string, a history that is not a list of [question, answer] pairs.
    """
    question = [text for name in ("instruction", "input") if (text := _text(record, name, where)) != ""]
    turns: list[Message] = []
    if (system := _text(record, "system", where)) != "":
        turns.extend(_said("system", system))
    for asked, answered in _history(record.get("history"), where):
        turns.extend(_said("user", asked) + _said("assistant", answered))
    if conversation:
        return (*turns, *_said("user", "\n".join(question)))
    return "\n\n".join([turn["content"] for turn in turns if turn["content"] != ""] + question)


def _text(record: Mapping[str, object], field: str, where: str) -> str:
    value = record.get(field, "")
    if not isinstance(value, str):
        raise FeedbackError(f"{where}: '{field}' must be text, got {quoted(value)}.")
    return value


def _history(value: object, where: str) -> list[tuple[str, str]]:
    if value is None:
        return []
    found = []
    for pair in value if isinstance(value, list | tuple) else [value]:
        match pair:
            case [str() as asked, str() as answered]:
                found.append((asked, answered))
            case _:
                raise FeedbackError(
                    f"{where}: 'history' must be a list of [question, answer] pairs, got {quoted(value)}."
                )
    return found


def with_system(prompt: Turns, record: Mapping[str, object], where: str) -> Turns:
    """Return `prompt` preceded by the text in the record's `system` column, if there is any.

    Raises:
        FeedbackError: the prompt is plain text or has a different system message, so one of them would be lost.
    """
    system = _text(record, "system", where)
    if system.strip() == "":
        return prompt
    if isinstance(prompt, str):
        raise FeedbackError(
            f"{where}: there is a 'system' column, but the prompt is plain text, and it is undefined how to join them."
            " Write the prompt as messages, or remove the column."
        )
    own = [message["content"] for message in prompt if message["role"] == "system"]
    if len(own) > 0 and own[0] != system:
        raise FeedbackError(f"{where}: 'system' differs from the system message in the conversation. Keep one of them.")
    return prompt if len(own) > 0 else _said("system", system) + prompt
