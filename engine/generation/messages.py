"""The messages of a conversation, as a chat template takes them."""

import reprlib
from collections.abc import Mapping
from typing import Any

KEYS = ("role", "content", "name", "tool_calls", "tool_call_id", "reasoning_content", "reasoning")
"""The keys of a message that templates read."""
EMPTY = ("refusal", "audio", "annotations", "function_call")
"""Keys of answers of OpenAI's that may be given back as a message, if they are empty."""


def read_messages(value: Any) -> list[dict[str, Any]]:
    """Check ``value`` as a list of messages, and join the text parts of each; ValueError names what is not.

    Roles are left to the template, which knows those of its model.
    """
    if not isinstance(value, list) or not value:
        raise ValueError(
            'messages must be a list with at least one message, such as [{"role": "user", "content": "…"}]'
        )
    return [_message(f"messages[{place}]", message) for place, message in enumerate(value)]


def _message(where: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, Mapping) or not isinstance(value.get("role"), str):
        raise ValueError(f'{where} must be an object with a text "role" and a "content"')  # noqa: TRY004
    for name in value:
        if name not in KEYS and (name not in EMPTY or value[name]):
            raise ValueError(f"{where} has the key {reprlib.repr(name)}, which is not supported")
    message = {name: value[name] for name in KEYS if value.get(name) is not None}
    if "content" in message:
        message["content"] = _text(f"{where}.content", message["content"])
    elif "tool_calls" not in message:
        raise ValueError(f"{where} has no content")
    return message


def _text(where: str, content: Any) -> str:
    """Return a content as one text; parts of text are joined by newlines."""
    if isinstance(content, str):
        return content
    parts = (
        [part if isinstance(part, Mapping) else {} for part in content] if isinstance(content, list) else [{}]
    )
    for part in parts:
        kind = part.get("type")
        if kind != "text" or not isinstance(part.get("text"), str):
            found = f"a part of type {reprlib.repr(kind)}" if kind else reprlib.repr(content)
            raise ValueError(f'{where} must be a text or parts {{"type": "text", "text": "…"}}, not {found}')
    return "\n".join(part["text"] for part in parts)
