"""What is asked of a model: a file of prompts or texts, what to do with them, and what of it has been done already."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from xpar.comm.communicator import Communicator
from xpar.comm.failure import agreed
from xpar.comm.partition import split_range
from xpar.engine.checkpoint.reader import Checkpoint
from xpar.engine.generation.answer_file import open_answer_file, read_answers, write_errors
from xpar.engine.generation.prompts import BadLine, Form, Prompt, prompt_form, read_prompts, text_form
from xpar.engine.generation.sampling import Sampling
from xpar.engine.generation.tokenizer import Tokenizer


@dataclass(frozen=True)
class WorkItem:
    """A prompt as the model reads it. ``hash``: of its text and its key; names its answer.

    ``first``: of ``ids``, the first that is scored, where that is asked.
    """

    prompt: Prompt
    ids: list[int]
    hash: str
    first: int = 1


class RequestBase(Protocol):
    """A file of questions to a model, whatever is to be done with them."""

    @property
    def checkpoint(self) -> Path: ...

    @property
    def prompts(self) -> Path: ...

    @property
    def out(self) -> Path: ...

    @property
    def form(self) -> Form:
        """Of the file's JSON lines."""

    def settings(self, config: Mapping[str, Any]) -> str:
        """A digest of all that decides an answer besides its prompt."""

    def question(self, prompt: Prompt, tokens: Tokenizer) -> WorkItem:
        """The prompt as tokens; ValueError if the model cannot take it."""


@dataclass(frozen=True)
class Request:
    """Answers. ``stops``: texts that end an answer and are not part of it. ``batch``: sequences that a rank runs at a time.
    ``prefill_tokens``: bound of the prompts' tokens that it reads in one forward; a longer prompt is read alone.

    ``dtype``, ``exact``: of the computation, for which answers of an earlier run are only taken if they were the same.
    """

    checkpoint: Path
    prompts: Path
    out: Path
    sampling: Sampling
    max_new_tokens: int
    stops: tuple[str, ...] = ()
    chat: bool = False
    batch: int = 16
    prefill_tokens: int = 4096
    dtype: torch.dtype = torch.float32
    exact: bool = False

    @property
    def form(self) -> Form:
        return prompt_form

    def settings(self, config: Mapping[str, Any]) -> str:
        decisive = {
            "sampling": asdict(self.sampling),
            "max_new_tokens": self.max_new_tokens,
            "stops": self.stops,
            "chat": self.chat,
            "dtype": str(self.dtype),
            "exact": self.exact,
            "config": dict(config),
        }
        return digest(decisive)

    def question(self, prompt: Prompt, tokens: Tokenizer) -> WorkItem:
        ids = tokens.encode(prompt.text)
        limit = None if tokens.positions is None else tokens.positions - self.max_new_tokens
        if limit is not None and len(ids) > limit:
            raise ValueError(
                f"{len(ids)} tokens, and the model has positions for {limit} besides --max-new-tokens; shorten it"
            )
        return WorkItem(prompt, ids, digest([prompt.key, prompt.text]))


@dataclass(frozen=True)
class ScoreRequest:
    """Log-probabilities. ``batch``: texts that a rank reads at a time. ``prefill_tokens``: tokens that it reads in one
    forward; a longer text is read alone, in pieces of that many.

    ``dtype``, ``exact``: as for :class:`Request`.
    """

    checkpoint: Path
    prompts: Path
    out: Path
    batch: int = 16
    prefill_tokens: int = 4096
    dtype: torch.dtype = torch.float32
    exact: bool = False

    @property
    def form(self) -> Form:
        return text_form

    def settings(self, config: Mapping[str, Any]) -> str:
        decisive = {
            "score": True,
            "dtype": str(self.dtype),
            "exact": self.prefill_tokens if self.exact else None,  # pieces of another length round otherwise
            "config": dict(config),
        }
        return digest(decisive)

    def question(self, prompt: Prompt, tokens: Tokenizer) -> WorkItem:
        ids, first = tokens.encode_pair(prompt.context, prompt.text)
        if len(ids) <= first:
            raise ValueError(
                "nothing to score: the first token of a text has none before it; give a longer text, or a context"
            )
        if tokens.positions is not None and len(ids) > tokens.positions:
            raise ValueError(
                f"{len(ids)} tokens, and the model has positions for {tokens.positions}; shorten it"
            )
        return WorkItem(prompt, ids, digest([prompt.key, prompt.context, prompt.text]), first)


@dataclass(frozen=True)
class Workload:
    """The same on every rank. ``queue``: what is to be answered, longest prompt first. ``order``: hash -> place of
    every question in the file. ``answered``: how many answers an earlier run left. ``refused``: lines that are no
    prompts. ``settings``: digest of what all answers have in common.
    """

    queue: tuple[WorkItem, ...]
    order: Mapping[str, int]
    answered: int
    refused: int
    settings: str


def read_request(comm: Communicator, request: RequestBase, tokens: Tokenizer, resume: bool) -> Workload:
    """Read the prompts, and with ``resume`` the answers there are; write what cannot be a prompt. Collective.

    Rank 0 reads and writes; raises one error on every rank if it cannot.
    """
    first = comm.rank == 0
    config = agreed(comm, lambda: Checkpoint(request.checkpoint).config)
    read = agreed(comm, lambda: read_prompts(request.prompts, request.form) if first else ([], []))
    prompts, bad = comm.all_gather_object(read)[0]
    settings = request.settings(config)
    part = split_range(len(prompts), comm.size, comm.rank)
    encoded = agreed(comm, lambda: [_question(request, p, tokens) for p in prompts[part]])
    everyones = [entry for entries in comm.all_gather_object(encoded) for entry in entries]
    questions = [entry for entry in everyones if isinstance(entry, WorkItem)]
    bad = sorted(bad + [e for e in everyones if isinstance(e, BadLine)], key=lambda e: e.line)

    def settle() -> set[str]:
        if not first:
            return set()
        write_errors(request.out, bad)
        kept = read_answers(request.out, {q.hash for q in questions}, settings) if resume else {}
        open_answer_file(request.out, kept.values())
        return set(kept)

    done = comm.all_gather_object(agreed(comm, settle))[0]
    queue = [q for q in questions if q.hash not in done]
    queue.sort(key=lambda q: (-len(q.ids), q.prompt.line))
    order = {q.hash: place for place, q in enumerate(questions)}
    return Workload(tuple(queue), order, len(done), len(bad), settings)


def _question(request: RequestBase, prompt: Prompt, tokens: Tokenizer) -> WorkItem | BadLine:
    try:
        return request.question(prompt, tokens)
    except ValueError as error:
        return BadLine(prompt.line, str(error))


def digest(value: object) -> str:
    """A name for ``value``, which JSON can hold."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:32]
