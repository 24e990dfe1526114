"""The lines of OpenAI's batch input files: ``{"custom_id": …, "method": …, "url": …, "body": {…}}``."""

import reprlib
from collections.abc import Mapping
from typing import Any

from xpar.engine.generation.line_fields import read_fields
from xpar.engine.generation.messages import read_messages

CHAT, COMPLETION = "/v1/chat/completions", "/v1/completions"
KEYS = ("custom_id", "method", "url", "body")


def is_batch_line(value: Mapping[str, Any]) -> bool:
    """Return whether ``value`` is a line of OpenAI's batch files, if maybe a faulty one."""
    return "custom_id" in value or "body" in value


def read_batch_line(value: Mapping[str, Any]) -> dict[str, Any]:
    """Read the parts of a prompt: id, text or messages, fields, and the name of the model.

    Raises ValueError for the first part that cannot be taken, by its name.
    """
    for name in value:
        if name not in KEYS:
            raise ValueError(f"field {reprlib.repr(name)} is unknown in a batch line of {', '.join(KEYS)}")
    if not isinstance(value.get("custom_id"), str) or not value["custom_id"]:
        raise ValueError(f"custom_id {reprlib.repr(value.get('custom_id'))}: must be a text")
    if value.get("method", "POST") != "POST":
        raise ValueError(f"method {reprlib.repr(value['method'])}: must be 'POST'")
    url, body = value.get("url"), value.get("body")
    if url not in (CHAT, COMPLETION):
        raise ValueError(f"url {reprlib.repr(url)}: must be {CHAT!r} or {COMPLETION!r}")
    if not isinstance(body, Mapping):
        raise ValueError(f"body {reprlib.repr(body)}: must be an object")  # noqa: TRY004
    is_chat = url == CHAT
    fields = read_fields(body, is_chat, frozenset({"messages" if is_chat else "prompt"}))
    parts = {"id": value["custom_id"], "fields": fields, "model": model_of(body), "is_batch": True}
    if is_chat:
        return {**parts, "text": "", "messages": read_messages(body.get("messages"))}
    return {**parts, "text": _prompt(body.get("prompt"))}


def model_of(value: Mapping[str, Any]) -> str | None:
    """Return the model that a line or body names, if it names one."""
    return value["model"] if isinstance(value.get("model"), str) else None


def _prompt(value: Any) -> str:
    """Return the one prompt of a request for a completion."""
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if not isinstance(value, str):
        raise ValueError(  # noqa: TRY004
            f"prompt {reprlib.repr(value)}: must be one text; write several as lines, and ids as their text"
        )
    return value
