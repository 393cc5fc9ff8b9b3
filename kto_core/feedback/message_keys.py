"""Names of the roles and of the keys of messages, as programs write them."""

from collections.abc import Mapping
from typing import Final

# Roles by the names that tools use, in lower case. Other names are kept: the chat template decides which it supports.
ROLES: Final[Mapping[str, str]] = {
    **dict.fromkeys(("user", "human", "prompter", "input_user"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bing", "bard", "model", "ai", "bot", "chatbot"), "assistant"),
    "system": "system",
    "developer": "developer",
    **dict.fromkeys(("tool", "observation", "function", "function_response", "tool_response"), "tool"),
    **dict.fromkeys(("function_call", "tool_call"), "function_call"),  # LLaMA-Factory's name and ms-swift's
}

# Keys of a message's role, content and reasoning; the first with a value is used.
ROLE_KEYS: Final = ("role", "from")
TEXT_KEYS: Final = ("content", "value", "text")
REASONING: Final = ("reasoning_content", "reasoning", "thinking", "thought")

# Keys as programs in JavaScript write them.
SPELLINGS: Final[Mapping[str, str]] = {
    "toolCalls": "tool_calls",
    "functionCall": "function_call",
    "toolCallId": "tool_call_id",
    "reasoningContent": "reasoning_content",
}

# Keys of a message with media or attached files, which the text does not contain.
MEDIA_KEYS: Final = (
    *("images", "image", "videos", "video", "audios", "audio", "image_url", "image_urls"),
    *("attachments", "experimental_attachments"),
)

# Keys of a message, in any form, that are read.
MESSAGE_KEYS: Final = frozenset(
    {
        *(*ROLE_KEYS, *TEXT_KEYS, *REASONING, *SPELLINGS, *SPELLINGS.values(), *MEDIA_KEYS),
        *("type", "data", "kwargs", "additional_kwargs", "parts", "toolInvocations", "refusal", "tool_calls"),
        *("call_id", "arguments", "output", "summary", "encrypted_content", "human", "user", "assistant"),
    }
)

# How the types of parts begin with which the AI SDK sends data of an application's own to its interface.
DATA_PART: Final = "data-"
