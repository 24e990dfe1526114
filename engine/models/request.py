"""What is asked of a model: a file of prompts, how to answer them, and what of it has been answered already."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from xpar.comm.communicator import Communicator
from xpar.comm.failure import agreed
from xpar.comm.shares import share
from xpar.engine.checkpoint import Checkpoint
from xpar.engine.models.prompts import BadLine, Prompt, read_prompts
from xpar.engine.models.results import keep_answers, read_answers, write_errors
from xpar.engine.models.sampling import Sampling
from xpar.engine.models.tokens import Tokens


@dataclass(frozen=True)
class Request:
    """``stops``: texts that end an answer and are not part of it. ``batch``: sequences that a rank runs at a time.

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
    dtype: torch.dtype = torch.float32
    exact: bool = False

    def settings(self, config: Mapping[str, Any]) -> str:
        """A digest of all that decides an answer besides its prompt."""
        decisive = {
            "sampling": asdict(self.sampling),
            "max_new_tokens": self.max_new_tokens,
            "stops": self.stops,
            "chat": self.chat,
            "dtype": str(self.dtype),
            "exact": self.exact,
            "config": dict(config),
        }
        return _digest(decisive)


@dataclass(frozen=True)
class Question:
    """A prompt as the model reads it. ``hash``: of its text and its key; names its answer."""

    prompt: Prompt
    ids: list[int]
    hash: str


@dataclass(frozen=True)
class Work:
    """The same on every rank. ``queue``: what is to be answered, longest prompt first. ``order``: hash -> place of
    every question in the file. ``answered``: how many answers an earlier run left. ``refused``: lines that are no
    prompts. ``settings``: digest of what all answers have in common.
    """

    queue: tuple[Question, ...]
    order: Mapping[str, int]
    answered: int
    refused: int
    settings: str


def prepare(comm: Communicator, request: Request, tokens: Tokens, resume: bool) -> Work:
    """Read the prompts, and with ``resume`` the answers there are; write what cannot be a prompt. Collective.

    Rank 0 reads and writes; raises one error on every rank if it cannot.
    """
    first = comm.rank == 0
    config = agreed(comm, lambda: Checkpoint(request.checkpoint).config)
    read = agreed(comm, lambda: read_prompts(request.prompts) if first else ([], []))
    prompts, bad = comm.all_gather_object(read)[0]
    settings = request.settings(config)
    limit = None if tokens.positions is None else tokens.positions - request.max_new_tokens
    part = share(len(prompts), comm.size, comm.rank)
    encoded = agreed(comm, lambda: [_question(p, tokens, limit) for p in prompts[part]])
    everyones = [entry for entries in comm.all_gather_object(encoded) for entry in entries]
    questions = [entry for entry in everyones if isinstance(entry, Question)]
    bad = sorted(bad + [e for e in everyones if isinstance(e, BadLine)], key=lambda e: e.line)

    def settle() -> set[str]:
        if not first:
            return set()
        write_errors(request.out, bad)
        kept = read_answers(request.out, {q.hash for q in questions}, settings) if resume else {}
        keep_answers(request.out, kept.values())
        return set(kept)

    done = comm.all_gather_object(agreed(comm, settle))[0]
    queue = [q for q in questions if q.hash not in done]
    queue.sort(key=lambda q: (-len(q.ids), q.prompt.line))
    order = {q.hash: place for place, q in enumerate(questions)}
    return Work(tuple(queue), order, len(done), len(bad), settings)


def _question(prompt: Prompt, tokens: Tokens, limit: int | None) -> Question | BadLine:
    try:
        ids = tokens.encode(prompt.text)
    except ValueError as error:
        return BadLine(prompt.line, str(error))
    if limit is not None and len(ids) > limit:
        return BadLine(
            prompt.line,
            f"{len(ids)} tokens, and the model has positions for {limit} besides --max-new-tokens; shorten it",
        )
    return Question(prompt, ids, _digest([prompt.key, prompt.text]))


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:32]
