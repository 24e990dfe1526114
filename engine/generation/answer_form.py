"""The forms of a file's records: xpar's own, and that of OpenAI's batch output.

Whatever the form, a later run finds line, hash and settings of a record by :func:`facts_of`.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from xpar.engine.generation.prompts import BadLine
from xpar.engine.generation.settings import short_digest
from xpar.engine.generation.work_item import WorkItem

Record = dict[str, Any]
Choice = Mapping[str, Any]
"""One answer to a prompt: text, tokens, finish, token_ids and, where they are asked for, logprobs."""
FACTS = "xpar"
"""The key of a record of OpenAI's form that holds what a later run compares."""
FINISH = {"end": "stop", "stop": "stop", "length": "length"}
"""The reason why an answer is complete -> its name in OpenAI's API."""


def facts_of(record: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the part of ``record`` with line, hash, settings and error, in either form."""
    facts = record.get(FACTS, record)
    return facts if isinstance(facts, Mapping) else record


class AnswerForm(Protocol):
    """The form of the records of a file."""

    @property
    def name(self) -> str: ...

    def answer(self, question: WorkItem, choices: Sequence[Choice], settings: str) -> Record:
        """Make the record of a complete answer; ``settings``: what all answers of the file share."""

    def failure(self, question: WorkItem, why: str, settings: str) -> Record:
        """Make the record of a prompt that the model could not answer."""

    def refusal(self, bad: BadLine) -> Record:
        """Make the record of a line that is no prompt."""


class OwnForm:
    """One flat object for each line of the file; several samples are a list of ``choices``."""

    name = "xpar"

    def answer(self, question: WorkItem, choices: Sequence[Choice], settings: str) -> Record:
        several = [{"index": index, **choice} for index, choice in enumerate(choices)]
        content = choices[0] if question.samples == 1 else {"choices": several}
        return {**_first(question), **content, "hash": question.hash, "settings": settings}

    def failure(self, question: WorkItem, why: str, settings: str) -> Record:
        return {**_first(question), "error": why, "hash": question.hash, "settings": settings}

    def refusal(self, bad: BadLine) -> Record:
        return bad.record()


@dataclass(frozen=True)
class OpenAiForm:
    """The lines of OpenAI's batch output, answered by ``model``."""

    model: str
    name = "openai"

    def answer(self, question: WorkItem, choices: Sequence[Choice], settings: str) -> Record:
        is_chat = question.prompt.messages is not None
        new = sum(choice["tokens"] for choice in choices)
        body = {
            "id": f"{'chatcmpl' if is_chat else 'cmpl'}-{question.hash}",
            "object": "chat.completion" if is_chat else "text_completion",
            "created": int(time.time()),
            "model": self.model,
            "system_fingerprint": f"fp_{short_digest(settings.encode()).removeprefix('#')}",
            "choices": [_choice(index, choice, is_chat) for index, choice in enumerate(choices)],
            "usage": {
                "prompt_tokens": len(question.ids),
                "completion_tokens": new,
                "total_tokens": len(question.ids) + new,
            },
        }
        facts = {"line": question.prompt.line, "hash": question.hash, "settings": settings}
        return _line(question.hash, _custom_id(question), 200, body, facts)

    def failure(self, question: WorkItem, why: str, settings: str) -> Record:
        facts = {"line": question.prompt.line, "error": why, "hash": question.hash, "settings": settings}
        return _line(question.hash, _custom_id(question), 500, _error(why, "server_error"), facts)

    def refusal(self, bad: BadLine) -> Record:
        facts = {"line": bad.line, "error": bad.error}
        custom_id = None if bad.id is None else str(bad.id)
        return _line(f"line-{bad.line}", custom_id, 400, _error(bad.error, "invalid_request_error"), facts)


def _first(question: WorkItem) -> Record:
    name = question.prompt.id
    return {"line": question.prompt.line, **({} if name is None else {"id": name})}


def _custom_id(question: WorkItem) -> str:
    name = question.prompt.id
    return f"line-{question.prompt.line}" if name is None else str(name)


def _choice(index: int, choice: Choice, is_chat: bool) -> Record:
    text = choice["text"]
    content = (
        {"message": {"role": "assistant", "content": text, "refusal": None}} if is_chat else {"text": text}
    )
    finish = FINISH[choice["finish"]]
    return {"index": index, **content, "logprobs": choice.get("logprobs"), "finish_reason": finish}


def _error(message: str, kind: str) -> Record:
    return {"error": {"message": message, "type": kind, "param": None, "code": None}}


def _line(name: str, custom_id: str | None, status: int, body: Record, facts: Record) -> Record:
    return {
        "id": f"batch_req_{name}",
        "custom_id": custom_id,
        "response": {"status_code": status, "request_id": name, "body": body},
        "error": None,
        FACTS: facts,
    }
