"""The prompts of a file, or the texts: plain, one a line, or JSON lines such as ``{"id": …, "prompt": …}``.

What cannot be one is a value too, with its line number, so that the rest of the file goes on.
"""

import json
import reprlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from xpar.engine.generation.line_fields import read_fields
from xpar.engine.generation.messages import read_messages
from xpar.engine.generation.openai_batch import is_batch_line, model_of, read_batch_line
from xpar.engine.generation.text_lines import decode, read_lines

Id = str | int
JSON_SUFFIXES = frozenset({".jsonl", ".ndjson", ".json"})


@dataclass(frozen=True)
class Prompt:
    """A prompt of a file; ``line`` counts from 1, ``id`` is the file's own or None.

    ``context``: what stands before ``text`` and is not scored, or None; only texts to be scored have one.
    ``messages``: a conversation that goes through the chat template in place of ``text``, or None.
    ``fields``: those of the line that decide its answer, as :mod:`xpar.engine.generation.line_fields` reads
    them. ``model``: the name of a model in the line. ``is_batch``: whether it is one of OpenAI's batch files.
    """

    line: int
    id: Id | None
    text: str
    context: str | None = None
    messages: list[dict[str, Any]] | None = None
    fields: Mapping[str, Any] = field(default_factory=dict)
    model: str | None = None
    is_batch: bool = False

    @property
    def key(self) -> str:
        """The key of this prompt among those of its file: its id, else its line."""
        return f"line {self.line}" if self.id is None else f"id {json.dumps(self.id)}"


@dataclass(frozen=True)
class BadLine:
    """A line that is no prompt, and why; ``id`` is the file's own, where it could be read.

    ``is_batch``: whether it seems to be a line of OpenAI's batch files.
    """

    line: int
    error: str
    id: Id | None = None
    is_batch: bool = False

    def result(self) -> dict[str, Any]:
        """Return this line as a result in the file of errors."""
        return {"line": self.line, **({} if self.id is None else {"id": self.id}), "error": self.error}


Form = Callable[[Mapping[str, Any]], Prompt]
"""JSON object of a line -> prompt without line and id; ValueError for one that has none."""
OWN_KEYS = frozenset({"id", "prompt", "messages"})


def prompt_form(value: Mapping[str, Any]) -> Prompt:
    """Read a JSON line to be answered, with its fields, or one of OpenAI's batch files.

    ``{"prompt": …}`` or ``{"messages": […]}``.
    """
    if is_batch_line(value):
        return Prompt(0, **read_batch_line(value))
    is_chat = value.get("messages") is not None
    if is_chat and value.get("prompt") is not None:
        raise ValueError("has a prompt and messages; give one of them")
    if not is_chat and not isinstance(value.get("prompt"), str):
        raise ValueError(
            'must be an object with a text "prompt", such as {"id": "a1", "prompt": "…"}, or with "messages"'
        )
    fields = read_fields(value, is_chat, OWN_KEYS)
    messages = read_messages(value["messages"]) if is_chat else None
    text = "" if is_chat else value["prompt"]
    return Prompt(0, None, text, messages=messages, fields=fields, model=model_of(value))


def text_form(value: Mapping[str, Any]) -> Prompt:
    """Read a JSON line to be scored: ``{"text": …}`` or ``{"context": …, "continuation": …}``."""
    parts = [name for name in ("text", "context", "continuation") if value.get(name) is not None]
    if all(isinstance(value[name], str) for name in parts):
        if parts == ["text"]:
            return Prompt(0, None, value["text"])
        if parts == ["context", "continuation"]:
            return Prompt(0, None, value["continuation"], value["context"])
    raise ValueError(
        'must be an object with a text "text", or with two, "context" and "continuation", such as '
        '{"id": "a1", "text": "…"}'
    )


def read_prompts(path: Path, form: Form = prompt_form) -> tuple[list[Prompt], list[BadLine]]:
    """Read all prompts of ``path`` in order, and all lines that are none; empty lines are neither.

    A file whose name ends in .jsonl, .ndjson or .json holds JSON lines of ``form``. OSError; ValueError for a
    file that as a whole is not UTF-8.
    """
    prompts: list[Prompt] = []
    bad: list[BadLine] = []
    lines_of: dict[Id, int] = {}
    in_json = path.suffix.lower() in JSON_SUFFIXES
    for line, raw in read_lines(path):
        try:
            text = decode(raw)
            prompt = _json_prompt(line, text, form) if in_json else Prompt(line, None, text)
            if prompt.id is not None and lines_of.setdefault(prompt.id, line) != line:
                raise ValueError(
                    f"id {reprlib.repr(prompt.id)} is that of line {lines_of[prompt.id]}; ids must differ"
                )
            prompts.append(prompt)
        except ValueError as error:
            bad.append(_bad_line(line, raw, str(error)) if in_json else BadLine(line, str(error)))
    return prompts, bad


def _bad_line(line: int, raw: bytes, error: str) -> BadLine:
    """Describe a line of JSON that is no prompt; its id is read where it is one of OpenAI's batch files."""
    try:
        value = json.loads(raw)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, Mapping) or not is_batch_line(value):
        return BadLine(line, error)
    name = value.get("custom_id")
    return BadLine(line, error, name if isinstance(name, str) else None, is_batch=True)


def _json_prompt(line: int, text: str, form: Form) -> Prompt:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON ({error})") from None
    prompt = form(value if isinstance(value, Mapping) else {})
    name = prompt.id if prompt.is_batch else value.get("id")
    if name is not None and (isinstance(name, bool) or not isinstance(name, str | int)):
        raise ValueError(f"id {reprlib.repr(name)} must be a text or a whole number")
    prompt = replace(prompt, line=line, id=name)
    try:
        parts = [name, prompt.text, prompt.context, prompt.messages, prompt.fields]
        json.dumps(parts, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise ValueError("holds half of a surrogate pair, which is no character") from None
    return prompt
