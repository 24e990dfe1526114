"""The request to a model: a file of prompts or texts, the options, and the part that is done already."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

import torch

from xpar.comm.communicator import Communicator
from xpar.comm.failure import agreed
from xpar.comm.partition import split_range
from xpar.engine.generation.answer_file import open_answer_file, read_answers, read_failures, write_errors
from xpar.engine.generation.fingerprint import fingerprint
from xpar.engine.generation.prompts import BadLine, Form, Prompt, prompt_form, read_prompts, text_form
from xpar.engine.generation.sampling import Sampling
from xpar.engine.generation.settings import settings_text
from xpar.engine.generation.tokenizer import Tokenizer


@dataclass(frozen=True)
class WorkItem:
    """A prompt as the model reads it; ``hash``, of its text and key, names its answer.

    ``first``: of ``ids``, the first that is scored, where that is asked.
    """

    prompt: Prompt
    ids: list[int]
    hash: str
    first: int = 1


class RequestBase(Protocol):
    """The request to process a file of questions to a model."""

    @property
    def checkpoint(self) -> Path: ...

    @property
    def prompts(self) -> Path: ...

    @property
    def out(self) -> Path: ...

    @property
    def form(self) -> Form:
        """The form of the file's JSON lines."""

    def settings(self) -> Mapping[str, object]:
        """Return the options that decide an answer, by name, but for prompt and checkpoint."""

    def check(self, tokens: Tokenizer) -> None:
        """Raise ValueError for options under which the model could take no line at all."""

    def question(self, prompt: Prompt, tokens: Tokenizer) -> WorkItem:
        """Encode ``prompt``; raise ValueError if the model cannot take it."""


@dataclass(frozen=True)
class Request:
    """The request to answer a file of prompts.

    ``stops``: texts that end an answer and are not part of it. ``stop_tokens``: ids or names of tokens that
    do. ``keep_special``: whether texts show special tokens. ``batch``: sequences that a rank runs at a time;
    None to choose. ``prefill_tokens``: bound of the prompts' tokens that it reads in one forward; a longer
    prompt is read in pieces, or alone. ``kv_bytes``: of a rank's keys and values; None to choose.
    ``shares_prefixes``: whether prompts that begin alike share them. ``dtype``, ``exact``: of the
    computation, for which answers of an earlier run are only taken if they were the same. ``exact_with``:
    names and values of what else the bits of exact mode depend on.
    """

    checkpoint: Path
    prompts: Path
    out: Path
    sampling: Sampling
    max_new_tokens: int
    stops: tuple[str, ...] = ()
    chat: bool = False
    batch: int | None = 16
    prefill_tokens: int = 4096
    dtype: torch.dtype = torch.float32
    exact: bool = False
    exact_with: tuple[tuple[str, str], ...] = ()
    stop_tokens: tuple[str, ...] = ()
    keep_special: bool = False
    kv_bytes: int | None = None
    shares_prefixes: bool = True

    @property
    def form(self) -> Form:
        return prompt_form

    def settings(self) -> Mapping[str, object]:
        sampling = asdict(self.sampling)
        further = dict(sampling.pop("settings"))
        return {
            "command": "generate",
            **{name.replace("_", "-"): value for name, value in sampling.items()},
            **{f"set-{name}": value for name, value in sorted(further.items())},
            "max-new-tokens": self.max_new_tokens,
            "stop": tuple(sorted(set(self.stops))),
            "stop-token": tuple(sorted(set(self.stop_tokens))),
            "keep-special-tokens": self.keep_special,
            "chat": self.chat,
            "dtype": str(self.dtype).removeprefix("torch."),
            **_exactness(self.exact, self.exact_with),
        }

    def check(self, tokens: Tokenizer) -> None:
        if tokens.positions is not None and self.max_new_tokens >= tokens.positions:
            raise ValueError(
                f"--max-new-tokens {self.max_new_tokens}: the model has {tokens.positions} positions for "
                f"prompt and answer together; give at most {tokens.positions - 1}"
            )

    def question(self, prompt: Prompt, tokens: Tokenizer) -> WorkItem:
        ids = tokens.encode(prompt.text)
        limit = None if tokens.positions is None else tokens.positions - self.max_new_tokens
        if limit is not None and len(ids) > limit:
            raise ValueError(
                f"{len(ids)} tokens, and the model has positions for {limit} besides --max-new-tokens; "
                "shorten it"
            )
        check_ids(ids, tokens)
        return WorkItem(prompt, ids, digest([prompt.key, prompt.text]))


@dataclass(frozen=True)
class ScoreRequest:
    """The request to score a file of texts, of which a rank reads ``batch`` at a time.

    ``prefill_tokens``: tokens that it reads in one forward; a longer text is read alone, in pieces of that
    many. The other fields are as for :class:`Request`.
    """

    checkpoint: Path
    prompts: Path
    out: Path
    batch: int = 16
    prefill_tokens: int = 4096
    dtype: torch.dtype = torch.float32
    exact: bool = False
    exact_with: tuple[tuple[str, str], ...] = ()

    @property
    def form(self) -> Form:
        return text_form

    def settings(self) -> Mapping[str, object]:
        return {
            "command": "score",
            "dtype": str(self.dtype).removeprefix("torch."),
            # Pieces of another length round otherwise.
            "prefill-tokens": self.prefill_tokens if self.exact else None,
            **_exactness(self.exact, self.exact_with),
        }

    def check(self, tokens: Tokenizer) -> None:
        """Raise nothing: every text decides for itself."""

    def question(self, prompt: Prompt, tokens: Tokenizer) -> WorkItem:
        ids, first = tokens.encode_pair(prompt.context, prompt.text)
        if len(ids) <= first:
            raise ValueError(
                "nothing to score: the first token of a text has none before it; give a longer text, or a "
                "context"
            )
        if tokens.positions is not None and len(ids) > tokens.positions:
            raise ValueError(
                f"{len(ids)} tokens, and the model has positions for {tokens.positions}; shorten it"
            )
        check_ids(ids, tokens)
        return WorkItem(prompt, ids, digest([prompt.key, prompt.context, prompt.text]), first)


@dataclass(frozen=True)
class Workload:
    """The work on a file, the same on every rank.

    ``queue``: what is to be answered, longest prompt first. ``order``: hash -> place of every question in the
    file. ``answered``, ``failed``: by an earlier run. ``refused``: lines that are no prompts. ``settings``:
    what all answers have in common, as one text.
    """

    queue: tuple[WorkItem, ...]
    order: Mapping[str, int]
    answered: int
    refused: int
    settings: str
    failed: int = 0


def read_request(comm: Communicator, request: RequestBase, tokens: Tokenizer, resume: bool) -> Workload:
    """Read the prompts and, with ``resume``, earlier answers; write bad lines. Collective.

    Rank 0 reads and writes, and writes nothing before all is read; one error on every rank if it cannot.
    """
    first = comm.rank == 0
    agreed(comm, lambda: request.check(tokens))
    read = agreed(
        comm, lambda: read_prompts(request.prompts, request.form) if first else ([], []), patient=True
    )
    prompts, bad = comm.all_gather_object(read)[0]
    settings = settings_text(
        {**request.settings(), "ends": sorted(tokens.ends), **fingerprint(comm, request.checkpoint)}
    )
    part = split_range(len(prompts), comm.size, comm.rank)
    encoded = agreed(comm, lambda: [_question(request, p, tokens) for p in prompts[part]], patient=True)
    everyones = [entry for entries in comm.all_gather_object(encoded) for entry in entries]
    questions = [entry for entry in everyones if isinstance(entry, WorkItem)]
    bad = sorted(bad + [e for e in everyones if isinstance(e, BadLine)], key=lambda e: e.line)

    def settle() -> tuple[set[str], set[str]]:
        if not first:
            return set(), set()
        hashes = {q.hash for q in questions}
        kept = read_answers(request.out, hashes, settings) if resume else {}
        failures = read_failures(request.out, hashes - kept.keys(), settings) if resume else {}
        write_errors(request.out, bad, failures.values())
        open_answer_file(request.out, kept.values())
        return set(kept), set(failures)

    done, failed = comm.all_gather_object(agreed(comm, settle))[0]
    queue = [q for q in questions if q.hash not in done | failed]
    queue.sort(key=lambda q: (-len(q.ids), q.prompt.line))
    order = {q.hash: place for place, q in enumerate(questions)}
    return Workload(tuple(queue), order, len(done), len(bad), settings, len(failed))


def check_ids(ids: Sequence[int], tokens: Tokenizer) -> None:
    """Raise ValueError for a token that the model's embedding has no row for."""
    if tokens.vocabulary is not None and ids and max(ids) >= tokens.vocabulary:
        token = max(ids)
        text = tokens.tokenizer.convert_ids_to_tokens(token)
        raise ValueError(
            f"token {token} ({text!r}) is one of the tokenizer's alone: the model's embedding has rows for 0 "
            f"to {tokens.vocabulary - 1}; leave its text out, or use the tokenizer that belongs to the model"
        )


def _question(request: RequestBase, prompt: Prompt, tokens: Tokenizer) -> WorkItem | BadLine:
    """Make the question of ``prompt``; what a template or a tokenizer raises refuses this line alone."""
    try:
        return request.question(prompt, tokens)
    except ValueError as error:
        return BadLine(prompt.line, str(error) or "ValueError", prompt.id)
    except BaseException as error:
        # A tokenizer in Rust that panics raises what is no Exception.
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise
        where = "the chat template or the tokenizer" if getattr(request, "chat", False) else "the tokenizer"
        return BadLine(
            prompt.line, f"{where} does not take it ({type(error).__name__}: {_brief(error)})", prompt.id
        )


def _brief(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [""])[0][:200]


def _exactness(exact: bool, exact_with: tuple[tuple[str, str], ...]) -> Mapping[str, object]:
    return {"exact": exact, **(dict(exact_with) if exact else {})}


def digest(value: object) -> str:
    """Return a short digest of ``value``, which JSON can express."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:32]
