"""The fields of a line that say how it is answered, with the names, types and ranges of OpenAI's API.

A field that asks for what is not done here, or that nobody knows, refuses its line and is named.
"""

import difflib
import json
import reprlib
from collections.abc import Callable, Mapping
from typing import Any

Check = Callable[[Any], Any]
"""Value of a field -> the value that is kept; ValueError with the rule for another."""

LABELS = frozenset(
    {"model", "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"}
)
"""Fields without effect here: they name the model, the user, or what a service does with the answer."""
IDLE: Mapping[str, tuple[Any, ...]] = {
    "stream": (False,),
    "stream_options": (),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "logit_bias": ({},),
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "web_search_options": (),
    "reasoning_effort": ("none",),
    "verbosity": ("medium",),
}
"""Fields of OpenAI's for what is not done here, and the values, besides null, that do not ask for it."""


def number(least: float, most: float, above: bool = False) -> Check:
    """Make the check of a number from ``least`` to ``most``; ``above``: ``least`` itself is none."""
    text = f"a number {'above' if above else 'from'} {least:g}{' and at most' if above else ' to'} {most:g}"

    def check(value: Any) -> float:
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or not least <= value <= most or (above and value == least):
            raise ValueError(f"must be {text}")
        return float(value)

    return check


def whole(least: int, most: int) -> Check:
    """Make the check of a whole number from ``least`` to ``most``."""

    def check(value: Any) -> int:
        if type(value) is not int or not least <= value <= most:
            raise ValueError(f"must be a whole number from {least} to {most}")
        return value

    return check


def flag(value: Any) -> bool:
    """Check a value that is true or false."""
    if not isinstance(value, bool):
        raise ValueError("must be true or false")  # noqa: TRY004
    return value


def texts(value: Any) -> list[str]:
    """Check a text or a list of texts, none of them empty."""
    several = value if isinstance(value, list) else [value]
    if not all(isinstance(text, str) and text for text in several):
        raise ValueError("must be a text or a list of texts, none of them empty")
    return several


def arguments(value: Any) -> dict[str, Any]:
    """Check the arguments of a chat template, by name."""
    taken = {"messages", "conversation", "tools", "documents", "tokenize", "add_generation_prompt"}
    if not isinstance(value, dict) or taken & value.keys():
        raise ValueError(f"must be an object without {', '.join(sorted(taken))}")
    return value


def json_format(value: Any) -> str | None:
    """Return the JSON schema of a ``response_format``, as text; None where any text will do."""
    kind = value.get("type") if isinstance(value, dict) else None
    if kind == "text":
        return None
    if kind == "json_object":
        return json.dumps({"type": "object"})
    described = value.get("json_schema") if kind == "json_schema" else None
    schema = described.get("schema") if isinstance(described, dict) else None
    if not isinstance(schema, dict):
        raise ValueError(  # noqa: TRY004
            'must be {"type": "json_schema", "json_schema": {"name": "…", "schema": {…}}}, or of the type '
            '"json_object" or "text"'
        )
    return json.dumps(schema)


COUNT = 2**31 - 1
FIELDS: Mapping[str, Check] = {
    "max_tokens": whole(1, COUNT),
    "max_completion_tokens": whole(1, COUNT),
    "temperature": number(0, 2),
    "top_p": number(0, 1, above=True),
    "top_k": whole(-1, COUNT),
    "min_p": number(0, 1),
    "n": whole(1, 128),
    "seed": whole(-(2**63), 2**63 - 1),
    "stop": texts,
    "repetition_penalty": number(0, 1e6, above=True),
    "presence_penalty": number(-2, 2),
    "frequency_penalty": number(-2, 2),
    "ignore_eos": flag,
    "response_format": json_format,
}
"""The fields of every line; those of OpenAI's API have its ranges, the others those of transformers."""
CHAT_FIELDS: Mapping[str, Check] = {
    "chat_template_kwargs": arguments,
    "logprobs": flag,
    "top_logprobs": whole(0, 20),
}
PROMPT_FIELDS: Mapping[str, Check] = {"logprobs": whole(0, 5)}
"""The log-probabilities of the five likeliest tokens at most, as the API for completions has it."""


def read_fields(value: Mapping[str, Any], is_chat: bool, own: frozenset[str]) -> dict[str, Any]:
    """Read the fields of a line or of the body of a request; ValueError for the first that cannot be taken.

    ``is_chat``: whether it has messages. ``own``: names that belong to the form of the line. What is null or
    has no effect is left out, so that equal results are equal lines.
    """
    known = {**FIELDS, **(CHAT_FIELDS if is_chat else PROMPT_FIELDS)}
    fields: dict[str, Any] = {}
    for name, given in value.items():
        if name in own or name in LABELS or given is None:
            continue
        if name in IDLE:
            if given not in IDLE[name]:
                raise ValueError(f"field {name!r} ({reprlib.repr(given)}) is not supported; leave it out")
        elif name in known:
            fields[name] = _checked(name, known[name], given)
        else:
            raise ValueError(_unknown(name, is_chat, [*own, *known]))
    return _combined(_settled(fields))


def _checked(name: str, check: Check, value: Any) -> Any:
    try:
        return check(value)
    except ValueError as error:
        raise ValueError(f"{name} {reprlib.repr(value)}: {error}") from None


def _unknown(name: str, is_chat: bool, known: list[str]) -> str:
    if name in CHAT_FIELDS and not is_chat and name not in PROMPT_FIELDS:
        return f"field {name!r} is for messages, and this line has a prompt; leave it out"
    likely = difflib.get_close_matches(name, known, 1)
    guess = f"did you mean {likely[0]!r}?" if likely else 'leave it out, or put it into "metadata"'
    return f"field {reprlib.repr(name)} is unknown; {guess}"


def _settled(fields: dict[str, Any]) -> dict[str, Any]:
    most = fields.pop("max_completion_tokens", None)
    if most is not None and fields.setdefault("max_tokens", most) != most:
        raise ValueError("max_tokens and max_completion_tokens differ; give one of them")
    if fields.get("top_k") == -1:
        fields["top_k"] = 0
    if fields.get("stop") == []:
        del fields["stop"]
    if fields.get("n") == 1:
        del fields["n"]
    top = fields.pop("top_logprobs", None)
    if fields.get("logprobs") is True:
        fields["logprobs"] = top or 0
    elif top:
        raise ValueError("top_logprobs needs logprobs true; give both")
    return {name: value for name, value in fields.items() if value is not None and value is not False}


def _combined(fields: dict[str, Any]) -> dict[str, Any]:
    """Check that a line's fields do not exclude each other."""
    if "response_format" in fields and "ignore_eos" in fields:
        raise ValueError(
            "response_format ends with an end token, and ignore_eos is true; leave one of them out"
        )
    return fields
