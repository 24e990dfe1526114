"""The prompts of a file: plain text, one a line, or JSON lines ``{"id": …, "prompt": …}``.

What cannot be a prompt is a value too, with its line number, so that the rest of the file goes on.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Id = str | int
JSON_SUFFIXES = frozenset({".jsonl", ".ndjson", ".json"})


@dataclass(frozen=True)
class Prompt:
    """``line`` counts from 1. ``id`` is the file's own, or None where it names none."""

    line: int
    id: Id | None
    text: str

    @property
    def key(self) -> str:
        """What tells this prompt from the others of its file: its id, else its line."""
        return f"line {self.line}" if self.id is None else f"id {json.dumps(self.id)}"


@dataclass(frozen=True)
class BadLine:
    """A line that is no prompt, and why."""

    line: int
    error: str

    def record(self) -> dict[str, Any]:
        return {"line": self.line, "error": self.error}


def read_prompts(path: Path) -> tuple[list[Prompt], list[BadLine]]:
    """All prompts of ``path`` in order, and all lines that are none; empty lines are neither.

    A file whose name ends in .jsonl, .ndjson or .json holds JSON lines. Raises OSError.
    """
    prompts: list[Prompt] = []
    bad: list[BadLine] = []
    lines_of: dict[Id, int] = {}
    parse = _json_prompt if path.suffix.lower() in JSON_SUFFIXES else _text_prompt
    for line, raw in _lines(path):
        try:
            prompt = parse(line, raw.decode("utf-8"))
            if prompt.id is not None and lines_of.setdefault(prompt.id, line) != line:
                raise ValueError(f"id {prompt.id!r} is that of line {lines_of[prompt.id]}; ids must differ")
            prompts.append(prompt)
        except UnicodeDecodeError as error:
            bad.append(BadLine(line, f"byte {error.start} is not UTF-8; save the file as UTF-8"))
        except ValueError as error:
            bad.append(BadLine(line, str(error)))
    return prompts, bad


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Lines end in a newline and nothing else: a prompt may hold any other separator that Unicode knows."""
    with open(path, "rb") as file:
        for line, raw in enumerate(file, start=1):
            text = raw.rstrip(b"\r\n")
            if text.strip():
                yield line, text


def _text_prompt(line: int, text: str) -> Prompt:
    return Prompt(line, None, text)


def _json_prompt(line: int, text: str) -> Prompt:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON ({error})") from None
    if not isinstance(value, Mapping) or not isinstance(value.get("prompt"), str):
        raise ValueError('must be an object with a text "prompt", such as {"id": "a1", "prompt": "…"}')  # noqa: TRY004
    try:
        json.dumps([value.get("id"), value["prompt"]], ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise ValueError("holds half of a surrogate pair, which is no character") from None
    name = value.get("id")
    if name is not None and (isinstance(name, bool) or not isinstance(name, str | int)):
        raise ValueError(f"id {name!r} must be a text or a whole number")
    return Prompt(line, name, value["prompt"])
