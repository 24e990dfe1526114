"""The prompts of a file, or the texts: plain, one a line, or JSON lines such as ``{"id": …, "prompt": …}``.

What cannot be one is a value too, with its line number, so that the rest of the file goes on.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Id = str | int
JSON_SUFFIXES = frozenset({".jsonl", ".ndjson", ".json"})


@dataclass(frozen=True)
class Prompt:
    """``line`` counts from 1. ``id`` is the file's own, or None where it names none.

    ``context``: what stands before ``text`` and is not scored, or None; only texts to be scored have one.
    """

    line: int
    id: Id | None
    text: str
    context: str | None = None

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


Form = Callable[[Mapping[str, Any]], tuple[str, str | None]]
"""JSON object of a line -> text and context; ValueError for one that has none."""


def prompt_form(value: Mapping[str, Any]) -> tuple[str, None]:
    """``{"prompt": …}``, which is to be answered."""
    if not isinstance(value.get("prompt"), str):
        raise ValueError('must be an object with a text "prompt", such as {"id": "a1", "prompt": "…"}')  # noqa: TRY004
    return value["prompt"], None


def text_form(value: Mapping[str, Any]) -> tuple[str, str | None]:
    """``{"text": …}`` or ``{"context": …, "continuation": …}``, which is to be scored."""
    parts = [name for name in ("text", "context", "continuation") if isinstance(value.get(name), str)]
    if parts == ["text"]:
        return value["text"], None
    if parts == ["context", "continuation"]:
        return value["continuation"], value["context"]
    raise ValueError(
        'must be an object with a text "text", or with two, "context" and "continuation", such as {"id": "a1", "text": "…"}'
    )


def read_prompts(path: Path, form: Form = prompt_form) -> tuple[list[Prompt], list[BadLine]]:
    """All prompts of ``path`` in order, and all lines that are none; empty lines are neither.

    A file whose name ends in .jsonl, .ndjson or .json holds JSON lines of ``form``. Raises OSError.
    """
    prompts: list[Prompt] = []
    bad: list[BadLine] = []
    lines_of: dict[Id, int] = {}
    in_json = path.suffix.lower() in JSON_SUFFIXES
    for line, raw in _lines(path):
        try:
            text = raw.decode("utf-8")
            prompt = _json_prompt(line, text, form) if in_json else Prompt(line, None, text)
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


def _json_prompt(line: int, text: str, form: Form) -> Prompt:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON ({error})") from None
    scored, context = form(value if isinstance(value, Mapping) else {})
    name = value.get("id")
    try:
        json.dumps([name, scored, context], ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise ValueError("holds half of a surrogate pair, which is no character") from None
    if name is not None and (isinstance(name, bool) or not isinstance(name, str | int)):
        raise ValueError(f"id {name!r} must be a text or a whole number")
    return Prompt(line, name, scored, context)
