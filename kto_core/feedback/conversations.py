"""Find the prompt and the completions in conversations, pairs and columns.

Invalid input raises FeedbackError with the location, the value that was found and what to write instead.
"""

import contextlib
import json
from collections.abc import Mapping, Sequence

from offline_kto.kto_core.errors import FeedbackError
from offline_kto.kto_core.feedback.foreign_messages import message_of_pair, messages_of_exchanges
from offline_kto.kto_core.feedback.left_out import EMPTY, LeftOut
from offline_kto.kto_core.feedback.message_keys import REASONING
from offline_kto.kto_core.feedback.messages import Message, Turns, as_conversation, said
from offline_kto.kto_core.feedback.quoting import quoted
from offline_kto.kto_core.feedback.text_parts import text_in
from offline_kto.kto_core.feedback.tool_calls import has_tool_calls

HUMAN_TURN = "\n\nHuman:"
ASSISTANT_TURN = "\n\nAssistant:"

# Columns of the system text; two that differ are refused.
SYSTEM_COLUMNS = ("system", "system_prompt", "system_message")


def check_completion(completion: Turns, where: str, field: str) -> None:
    """Check that a completion is not empty, and that its first and last messages are the assistant's.

    Tool messages may come between them. An assistant's message with tool_calls may have no text.

    Raises:
        LeftOut: it is empty or blank.
        FeedbackError: it has messages of other roles.
    """
    if isinstance(completion, str):
        if completion.strip() == "":
            raise LeftOut(EMPTY, f"'{field}'")
        return
    for index, message in enumerate(completion):
        role = message["role"]
        outer = index in (0, len(completion) - 1)
        if role in ("user", "system", "developer") or (outer and role != "assistant"):
            raise FeedbackError(
                f"{where}: '{field}' must contain only messages of the assistant, but message {index + 1} has the role"
                f" {quoted(role)}. Move it to the prompt, or remove the row."
            )
        if role == "assistant" and not says_something(message):
            raise LeftOut(EMPTY, f"message {index + 1} of '{field}'")


def says_something(message: Message) -> bool:
    """Return whether a message has a text, reasoning or a call of a tool."""
    texts = [message.get(name) for name in ("content", *REASONING)]
    return has_tool_calls(message) or any(isinstance(text, str) and text.strip() for text in texts)


def split_at_results(completion: tuple[Message, ...]) -> tuple[tuple[Message, ...], tuple[Message, ...]]:
    """Return (the messages up to the last tool result, the rest).

    The model did not write tool results, so they must not be trained on: they are context.
    """
    results = [index for index, message in enumerate(completion) if message["role"] == "tool"]
    size = results[-1] + 1 if results else 0
    return completion[:size], completion[size:]


def without_last_results(messages: tuple[Message, ...]) -> tuple[Message, ...]:
    """Return an answer without results of tools after its last call: the model did not write them, and nothing follows them."""
    size = max((number for number, one in enumerate(messages, 1) if one["role"] != "tool"), default=len(messages))
    return messages[:size]


def split_conversation(
    messages: tuple[Message, ...], where: str, field: str
) -> tuple[tuple[Message, ...], tuple[Message, ...]]:
    """Return (all but the last message, the last message). The last one must be the assistant's.

    Raises:
        FeedbackError: the last message has another role, or is the only one.
    """
    if messages[-1]["role"] != "assistant":
        raise FeedbackError(
            f"{where}: the label is that of the last message of '{field}', which must have the role"
            f' "assistant", got {quoted(messages[-1]["role"])}. Remove the messages after the answer, or remove the row.'
        )
    if len(messages) == 1:
        raise FeedbackError(f"{where}: '{field}' contains only an answer. Add the messages before it.")
    return messages[:-1], messages[-1:]


def join_sides(prompt: Turns, answers: Sequence[tuple[str, Turns]], where: str) -> tuple[Turns, tuple[Turns, ...]]:
    """Return one prompt and its completions, all as text or all as messages; `answers` are (column, value).

    If one side is a conversation, text on the other side becomes a user's or an assistant's message. If an answer
    is a whole conversation, the prompt is removed from it:

        prompt messages   the conversation must begin with them
        prompt text       the completion is what follows the last message that is neither the assistant's nor
                          a tool's; before it one of the user's messages must be the prompt

    Answers that are text are never cut: they may repeat the question. A prompt of messages that ends with one of the
    answers, as logs of whole conversations do, is cut before it.

    Raises:
        FeedbackError: a conversation that does not repeat the prompt, or answers to different prompts.
    """
    if isinstance(prompt, str) and all(isinstance(answer, str) for _, answer in answers):
        return prompt, tuple(answer for _, answer in answers)
    for _, answer in answers:
        prompt = _before_answer(prompt, said("assistant", answer))
    pairs = [_cut_prompt(prompt, answer, where, field) for field, answer in answers]
    prompts = [begin for begin, _ in pairs]
    if any(begin != prompts[0] for begin in prompts):
        raise FeedbackError(f"{where}: 'chosen' and 'rejected' answer different prompts. Let both answer the same one.")
    return prompts[0], tuple(completion for _, completion in pairs)


def _before_answer(prompt: Turns, answered: tuple[Message, ...]) -> Turns:
    """Return the messages of a prompt before an answer that it ends with; any other prompt as it is."""
    size = len(answered)
    if isinstance(prompt, str) or size >= len(prompt) or any(m["role"] not in ("assistant", "tool") for m in answered):
        return prompt
    ends = [
        [(m["role"], m["content"].strip(), m.get("tool_calls")) for m in side] for side in (prompt[-size:], answered)
    ]
    return prompt[:-size] if ends[0] == ends[1] and prompt[-size - 1]["role"] in ("user", "tool") else prompt


def _cut_prompt(
    prompt: Turns, answer: Turns, where: str, field: str
) -> tuple[tuple[Message, ...], tuple[Message, ...]]:
    asked = said("user", prompt)
    answered = said("assistant", answer)
    others = [index for index, m in enumerate(answered) if m["role"] not in ("assistant", "tool")]
    size = len(asked)
    repeats = answered[:size] == asked
    if not repeats and len(others) == 0:
        return asked, answered
    if isinstance(prompt, str) and len(others) > 0:
        size = others[-1] + 1
        repeats = any(m["role"] == "user" and m["content"].strip() == prompt.strip() for m in answered[:size])
    if not repeats:
        raise FeedbackError(
            f"{where}: '{field}' is a conversation that does not repeat the prompt. Let it begin with the"
            " prompt's messages, or contain only the assistant's answer."
        )
    if answered == asked:
        raise FeedbackError(
            f"{where}: '{field}' is the conversation of the prompt. Choose the columns of prompt and answer with "
            "--prompt-field and --completion-field, or remove the row if it has no answer."
        )
    if size == len(answered):
        raise FeedbackError(f"{where}: '{field}' repeats the prompt and has no answer. Remove the row.")
    return answered[:size], answered[size:]


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
            f"{where}: one of 'chosen' and 'rejected' is text, the other messages, and there is no 'prompt'."
            " Write both in the same form, or name the prompt's column with --prompt-field."
        )
    size = _shared_messages(chosen, rejected, where)
    return chosen[:size], (chosen[size:], rejected[size:])


def part_early(chosen: Turns | None, rejected: Turns | None) -> bool:
    """Return whether two conversations have a common beginning and differ before their last answers.

    These answers have different prompts. Both conversations must end with the assistant.
    """
    if not isinstance(chosen, tuple) or not isinstance(rejected, tuple):
        return False
    size = 0
    while size < min(len(chosen), len(rejected)) and chosen[size] == rejected[size]:
        size += 1
    answered = chosen[-1]["role"] == rejected[-1]["role"] == "assistant"
    return answered and 0 < size < max(len(chosen), len(rejected)) - 1


def _shared_messages(chosen: tuple[Message, ...], rejected: tuple[Message, ...], where: str) -> int:
    size = 0
    while size < min(len(chosen), len(rejected)) - 1 and chosen[size] == rejected[size]:
        size += 1
    if size == 0:
        raise FeedbackError(
            f"{where}: 'chosen' and 'rejected' have no common beginning, and there is no 'prompt'. Add a prompt, or"
            " name its column with --prompt-field, or begin both with the messages they answer."
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
            f"{where}: 'chosen' and 'rejected' have no common turn that begins with an empty line and 'Assistant:',"
            " and there is no 'prompt'. Add a prompt, or name its column with --prompt-field."
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
    if (system := system_text(record, where)) != "":
        turns.extend(said("system", system))
    turns.extend(unasked(history(record, where), "\n".join(question)))
    if conversation:
        return (*turns, *said("user", "\n".join(question)))
    return "\n\n".join([turn["content"] for turn in turns if turn["content"] != ""] + question)


def _text(record: Mapping[str, object], field: str, where: str) -> str:
    value = record.get(field, "")
    if not isinstance(value, str):
        raise FeedbackError(f"{where}: '{field}' must be text, got {quoted(value)}.")
    return value


def history(record: Mapping[str, object], where: str) -> tuple[Message, ...]:
    """Return the earlier turns of a record: pairs of question and answer, or messages, also as JSON text.

    Raises:
        FeedbackError: `history` has another form.
    """
    value = record.get("history")
    if isinstance(value, str):
        with contextlib.suppress(ValueError, RecursionError):  # refused below
            value = json.loads(value) if value.strip() else None
    if value is None or value == []:
        return ()
    items = value if isinstance(value, list | tuple) else [value]
    if all(isinstance(one, Mapping) or message_of_pair(one) is not None for one in items):
        return as_conversation(value, where, "history")
    turns = messages_of_exchanges(items)
    if turns is None:
        raise FeedbackError(
            f"{where}: 'history' must be a list of [question, answer] pairs or of messages, got {quoted(value)}."
        )
    return tuple(turns)


def unasked(earlier: tuple[Message, ...], question: str) -> tuple[Message, ...]:
    """Return earlier turns without the question, with which they end where a program appends it before it asks the model."""
    begun = earlier
    while begun and begun[-1]["role"] == "assistant" and not says_something(begun[-1]):
        begun = begun[:-1]
    asks = bool(begun) and begun[-1]["role"] == "user" and begun[-1]["content"].strip() == question.strip()
    return begun[:-1] if asks else earlier


def system_text(record: Mapping[str, object], where: str) -> str:
    """Return the text of a record's system column; empty if there is none.

    Raises:
        FeedbackError: two columns with different texts.
    """
    texts = {name: text_in(record[name]) for name in SYSTEM_COLUMNS if name in record}
    found = {name: text for name in texts if (text := _text(texts, name, where)).strip()}
    if len(set(found.values())) > 1:
        raise FeedbackError(f"{where}: {' and '.join(map(repr, found))} differ. Keep one of them.")
    return next(iter(found.values()), "")


def with_system(prompt: Turns, record: Mapping[str, object], where: str) -> Turns:
    """Return `prompt` preceded by the text in the record's system column, if there is any.

    Raises:
        FeedbackError: the prompt is plain text or has a different system message, so one of them would be lost.
    """
    system = system_text(record, where)
    if system == "":
        return prompt
    if isinstance(prompt, str):
        raise FeedbackError(
            f"{where}: the record has a system text and a prompt of plain text, which cannot be joined without a chat"
            " template. Write the prompt as messages, use a tokenizer with a chat template, or remove the column."
        )
    own = [message["content"] for message in prompt if message["role"] in ("system", "developer")]
    if len(own) > 0 and own[0].strip() != system.strip():
        raise FeedbackError(
            f"{where}: the system column differs from the system message in the conversation. Keep one of them."
        )
    return prompt if len(own) > 0 else said("system", system) + tuple(prompt)
