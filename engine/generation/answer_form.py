"""The forms of a file's results: xpar's own, and that of OpenAI's batch output.

Whatever the form, a later run finds line, hash and settings of a result by :func:`facts_of`.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from xpar.engine.generation.prompts import BadLine
from xpar.engine.generation.settings import short_digest
from xpar.engine.generation.work_item import WorkItem

Result = dict[str, Any]
Choice = Mapping[str, Any]
"""One answer to a prompt: text, tokens, finish, token_ids and, where they are asked for, logprobs."""
FACTS = "xpar"
"""The key of a result of OpenAI's form that holds what a later run compares."""
FINISH = {"end": "stop", "stop": "stop", "length": "length"}
"""The reason why an answer is complete -> its name in OpenAI's API."""


def facts_of(result: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the part of ``result`` with line, hash, settings and error, in either form."""
    facts = result.get(FACTS, result)
    return facts if isinstance(facts, Mapping) else result


class AnswerForm(Protocol):
    """The form of the results of a file."""

    @property
    def name(self) -> str: ...

    def answer(self, item: WorkItem, choices: Sequence[Choice], settings: str) -> Result:
        """Make the result of a complete answer; ``settings``: what all answers of the file share."""

    def failure(self, item: WorkItem, why: str, settings: str) -> Result:
        """Make the result of a prompt that the model could not answer."""

    def refusal(self, bad: BadLine) -> Result:
        """Make the result of a line that is no prompt."""


class OwnForm:
    """One flat object for each line of the file; several samples are a list of ``choices``."""

    name = "xpar"

    def answer(self, item: WorkItem, choices: Sequence[Choice], settings: str) -> Result:
        several = [{"index": index, **choice} for index, choice in enumerate(choices)]
        content = choices[0] if item.samples == 1 else {"choices": several}
        return {**_first(item), **content, "hash": item.hash, "settings": settings}

    def failure(self, item: WorkItem, why: str, settings: str) -> Result:
        return {**_first(item), "error": why, "hash": item.hash, "settings": settings}

    def refusal(self, bad: BadLine) -> Result:
        return bad.result()


@dataclass(frozen=True)
class OpenAiForm:
    """The lines of OpenAI's batch output, answered by ``model``."""

    model: str
    name = "openai"

    def answer(self, item: WorkItem, choices: Sequence[Choice], settings: str) -> Result:
        is_chat = item.prompt.messages is not None
        new = sum(choice["tokens"] for choice in choices)
        body = {
            "id": f"{'chatcmpl' if is_chat else 'cmpl'}-{item.hash}",
            "object": "chat.completion" if is_chat else "text_completion",
            "created": int(time.time()),
            "model": self.model,
            "system_fingerprint": f"fp_{short_digest(settings.encode()).removeprefix('#')}",
            "choices": [_choice(index, choice, is_chat) for index, choice in enumerate(choices)],
            "usage": {
                "prompt_tokens": len(item.ids),
                "completion_tokens": new,
                "total_tokens": len(item.ids) + new,
            },
        }
        facts = {"line": item.prompt.line, "hash": item.hash, "settings": settings}
        return _line(item.hash, _custom_id(item), 200, body, facts)

    def failure(self, item: WorkItem, why: str, settings: str) -> Result:
        facts = {"line": item.prompt.line, "error": why, "hash": item.hash, "settings": settings}
        return _line(item.hash, _custom_id(item), 500, _error(why, "server_error"), facts)

    def refusal(self, bad: BadLine) -> Result:
        facts = {"line": bad.line, "error": bad.error}
        custom_id = None if bad.id is None else str(bad.id)
        return _line(f"line-{bad.line}", custom_id, 400, _error(bad.error, "invalid_request_error"), facts)


def _first(item: WorkItem) -> Result:
    name = item.prompt.id
    return {"line": item.prompt.line, **({} if name is None else {"id": name})}


def _custom_id(item: WorkItem) -> str:
    name = item.prompt.id
    return f"line-{item.prompt.line}" if name is None else str(name)


def _choice(index: int, choice: Choice, is_chat: bool) -> Result:
    text = choice["text"]
    content = (
        {"message": {"role": "assistant", "content": text, "refusal": None}} if is_chat else {"text": text}
    )
    finish = FINISH[choice["finish"]]
    return {"index": index, **content, "logprobs": choice.get("logprobs"), "finish_reason": finish}


def _error(message: str, kind: str) -> Result:
    return {"error": {"message": message, "type": kind, "param": None, "code": None}}


def _line(name: str, custom_id: str | None, status: int, body: Result, facts: Result) -> Result:
    return {
        "id": f"batch_req_{name}",
        "custom_id": custom_id,
        "response": {"status_code": status, "request_id": name, "body": body},
        "error": None,
        FACTS: facts,
    }
