"""The request to a model: a file of prompts or texts, the options, and the part that is done already."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Protocol

import torch

from xpar.comm.communicator import Communicator
from xpar.comm.failure import agreed
from xpar.comm.partition import split_range
from xpar.engine.generation.answer_file import Done, settle_files
from xpar.engine.generation.answer_form import AnswerForm, OpenAiForm, OwnForm
from xpar.engine.generation.answer_options import AnswerOptions, RunOptions
from xpar.engine.generation.fingerprint import fingerprint
from xpar.engine.generation.prompts import BadLine, Form, Prompt, prompt_form, read_prompts, text_form
from xpar.engine.generation.sampling import Sampling
from xpar.engine.generation.settings import settings_text
from xpar.engine.generation.tokenizer import Tokenizer
from xpar.engine.generation.work_item import WorkItem


class RequestBase(Protocol):
    """The request to process a file of prompts or texts by a model."""

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

    def check(self, tokenizer: Tokenizer) -> None:
        """Raise ValueError for options under which the model could take no line at all."""

    def make_item(self, prompt: Prompt, tokenizer: Tokenizer) -> WorkItem:
        """Encode ``prompt`` as an item of work; raise ValueError if the model cannot take it."""

    def answer_form(self, is_batch: bool) -> AnswerForm:
        """Return the form of the results; ``is_batch``: whether the file is one of OpenAI's batch files."""


@dataclass(frozen=True)
class Request:
    """The request to answer a file of prompts.

    ``stops``: texts that end an answer and are not part of it. ``stop_tokens``: ids or names of tokens that
    do. ``keep_special``: whether texts show special tokens. ``batch``: sequences that a rank runs at a time;
    None to choose. ``prefill_tokens``: bound of the prompts' tokens that it reads in one forward, or None to
    choose; a longer prompt is read in pieces, or alone. ``kv_bytes``: of its keys and values; None to choose.
    ``shares_prefixes``: whether prompts that begin alike share them. ``dtype``, ``exact``: of the
    computation, for which answers of an earlier run are only taken if they were the same. ``exact_with``:
    names and values of what else the bits of exact mode depend on, and ``quantize``.
    ``options``: those of the run, from which lines with fields of their own begin; None for ``sampling``,
    ``max_new_tokens`` and ``stops``. ``format``: of the answers, ``xpar``, ``openai`` or, for that of the
    file, ``auto``. ``model``: the name that answers in OpenAI's form have.
    ``activations``: what is done to inputs of experts before they are multiplied, or None for nothing.
    """

    checkpoint: Path
    prompts: Path
    out: Path
    sampling: Sampling
    max_new_tokens: int
    stops: tuple[str, ...] = ()
    chat: bool = False
    batch: int | None = 16
    prefill_tokens: int | None = 4096
    dtype: torch.dtype = torch.float32
    exact: bool = False
    exact_with: tuple[tuple[str, str], ...] = ()
    activations: str | None = None
    stop_tokens: tuple[str, ...] = ()
    keep_special: bool = False
    options: RunOptions | None = None
    format: str = "auto"
    model: str = ""
    kv_bytes: int | None = None
    shares_prefixes: bool = True

    @property
    def form(self) -> Form:
        return prompt_form

    @cached_property
    def _run_options(self) -> RunOptions:
        return self.options or RunOptions.of(self.sampling, self.max_new_tokens, self.stops)

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
            "activations": self.activations,
            **_exactness(self.exact, self.exact_with),
        }

    def check(self, tokenizer: Tokenizer) -> None:
        if tokenizer.positions is not None and self.max_new_tokens >= tokenizer.positions:
            raise ValueError(
                f"--max-new-tokens {self.max_new_tokens}: the model has {tokenizer.positions} positions for "
                f"prompt and answer together; give at most {tokenizer.positions - 1}"
            )

    def make_item(self, prompt: Prompt, tokenizer: Tokenizer) -> WorkItem:
        options = self._run_options.of_line(prompt.fields) if prompt.fields else None
        if prompt.messages is None:
            ids = tokenizer.encode(prompt.text, chat=False if prompt.is_batch else None)
        else:
            ids = tokenizer.encode_messages(prompt.messages, **prompt.fields.get("chat_template_kwargs", {}))
        most, name = self.max_new_tokens, "--max-new-tokens"
        if "max_tokens" in prompt.fields and options is not None:
            most, name = options.max_new_tokens, f"max_tokens {options.max_new_tokens}"
        limit = None if tokenizer.positions is None else tokenizer.positions - most
        if limit is not None and len(ids) > limit:
            raise ValueError(
                f"{len(ids)} tokens, and the model has positions for {max(0, limit)} besides {name}; "
                "shorten it"
            )
        check_ids(ids, tokenizer)
        if options is not None and options.schema is not None:
            tokenizer.grammars.check(options.schema)
        answer_hash, draws_hash = _hashes(prompt, ids, options)
        samples = prompt.fields.get("n", 1)
        return WorkItem(prompt, ids, answer_hash, options=options, draws_hash=draws_hash, samples=samples)

    def answer_form(self, is_batch: bool) -> AnswerForm:
        if self.format == "openai" or (self.format == "auto" and is_batch):
            return OpenAiForm(self.model or self.checkpoint.name)
        return OwnForm()


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
    activations: str | None = None

    @property
    def form(self) -> Form:
        return text_form

    def settings(self) -> Mapping[str, object]:
        return {
            "command": "score",
            "dtype": str(self.dtype).removeprefix("torch."),
            # Pieces of another length round otherwise.
            "prefill-tokens": self.prefill_tokens if self.exact else None,
            "activations": self.activations,
            **_exactness(self.exact, self.exact_with),
        }

    def check(self, tokenizer: Tokenizer) -> None:
        """Raise nothing: every text decides for itself."""

    def make_item(self, prompt: Prompt, tokenizer: Tokenizer) -> WorkItem:
        ids, first = tokenizer.encode_pair(prompt.context, prompt.text)
        if len(ids) <= first:
            raise ValueError(
                "nothing to score: the first token of a text has none before it; give a longer text, or a "
                "context"
            )
        if tokenizer.positions is not None and len(ids) > tokenizer.positions:
            raise ValueError(
                f"{len(ids)} tokens, and the model has positions for {tokenizer.positions}; shorten it"
            )
        check_ids(ids, tokenizer)
        return WorkItem(prompt, ids, hash_of([prompt.key, prompt.context, prompt.text]), first)

    def answer_form(self, is_batch: bool) -> AnswerForm:
        return OwnForm()


@dataclass(frozen=True)
class Workload:
    """The work on a file, the same on every rank.

    ``queue``: what is to be answered, longest prompt first. ``order``: hash -> place of every item of work in
    the file. ``answered``, ``failed``: by an earlier run. ``refused``: lines that are no prompts.
    ``settings``: what all answers have in common, as one text. ``form``: of the answers. ``notes``: lines for
    the console.
    """

    queue: tuple[WorkItem, ...]
    order: Mapping[str, int]
    answered: int
    refused: int
    settings: str
    failed: int = 0
    form: AnswerForm = field(default_factory=OwnForm)
    notes: tuple[str, ...] = ()


def read_request(comm: Communicator, request: RequestBase, tokenizer: Tokenizer, resume: bool) -> Workload:
    """Read the prompts and, with ``resume``, earlier answers; write bad lines. Collective.

    Rank 0 reads and writes, and writes nothing before all is read; one error on every rank if it cannot.
    """
    first = comm.rank == 0
    agreed(comm, lambda: request.check(tokenizer))
    read = agreed(
        comm, lambda: read_prompts(request.prompts, request.form) if first else ([], []), patient=True
    )
    prompts, bad = comm.all_gather_object(read)[0]
    form = request.answer_form(_is_batch(prompts, bad))
    settings = settings_text(
        {
            **request.settings(),
            **({} if form.name == OwnForm.name else {"format": form.name}),
            "ends": sorted(tokenizer.ends),
            **fingerprint(comm, request.checkpoint),
        }
    )
    part = split_range(len(prompts), comm.size, comm.rank)
    encoded = agreed(comm, lambda: [_make_item(request, p, tokenizer) for p in prompts[part]], patient=True)
    everyones = [entry for entries in comm.all_gather_object(encoded) for entry in entries]
    items = [entry for entry in everyones if isinstance(entry, WorkItem)]
    bad = sorted(bad + [e for e in everyones if isinstance(e, BadLine)], key=lambda e: e.line)

    def settle() -> Done:
        if not first:
            return Done()
        return settle_files(request.out, {item.hash: item for item in items}, bad, settings, form, resume)

    done = comm.all_gather_object(agreed(comm, settle))[0]
    queue = [sample for item in items for sample in _samples_left(item, done)]
    queue.sort(key=lambda item: (-len(item.ids), item.prompt.line, item.sample))
    order = {item.hash: place for place, item in enumerate(items)}
    notes = tuple(_notes(request, prompts, form))
    return Workload(
        tuple(queue), order, len(done.answered), len(bad), settings, len(done.failed), form, notes
    )


def _is_batch(prompts: Sequence[Prompt], bad: Sequence[BadLine]) -> bool:
    """Return whether a file is one of OpenAI's batch files, which its first line decides that is JSON."""
    entries: list[Prompt | BadLine] = [*prompts, *(entry for entry in bad if entry.is_batch)]
    return bool(entries) and min(entries, key=lambda entry: entry.line).is_batch


def _samples_left(item: WorkItem, done: Done) -> list[WorkItem]:
    """Return the samples of ``item`` that are still to be drawn."""
    if item.hash in done.answered or item.hash in done.failed:
        return []
    if item.samples == 1:
        return [item]
    left = [n for n in range(item.samples) if (item.hash, n) not in done.samples]
    return [replace(item, sample=number) for number in left]


def _notes(request: RequestBase, prompts: Sequence[Prompt], form: AnswerForm) -> Iterator[str]:
    """Describe what a user may not expect of a file: the form of its answers, and who answers."""
    if form.name != OwnForm.name:
        yield f"{request.out}: in the form of OpenAI's batch output (--format xpar for xpar's own)"
    answering = getattr(request, "model", "") or request.checkpoint.name
    named = sorted({prompt.model for prompt in prompts if prompt.model} - {answering})
    if named:
        names = ", ".join(map(repr, named[:3])) + (", …" if len(named) > 3 else "")
        yield f"{request.prompts}: lines name the model {names}; {answering} answers all of them"


def check_ids(ids: Sequence[int], tokenizer: Tokenizer) -> None:
    """Raise ValueError for a token that the model's embedding has no row for."""
    if tokenizer.vocabulary is not None and ids and max(ids) >= tokenizer.vocabulary:
        token = max(ids)
        text = tokenizer.tokenizer.convert_ids_to_tokens(token)
        raise ValueError(
            f"token {token} ({text!r}) is one of the tokenizer's alone: the model's embedding has rows for 0 "
            f"to {tokenizer.vocabulary - 1}; leave its text out, or use the tokenizer that belongs to the "
            "model"
        )


def _make_item(request: RequestBase, prompt: Prompt, tokenizer: Tokenizer) -> WorkItem | BadLine:
    """Make the work item of ``prompt``; what a template or a tokenizer raises refuses this line alone."""
    try:
        return request.make_item(prompt, tokenizer)
    except ValueError as error:
        return BadLine(prompt.line, str(error) or "ValueError", prompt.id, prompt.is_batch)
    except BaseException as error:
        # A tokenizer in Rust that panics raises what is no Exception.
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise
        is_chat = getattr(request, "chat", False) or prompt.messages is not None
        where = "the chat template or the tokenizer" if is_chat else "the tokenizer"
        why = f"{where} does not take it ({type(error).__name__}: {_brief(error)})"
        return BadLine(prompt.line, why, prompt.id, prompt.is_batch)


def _brief(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [""])[0][:200]


def _exactness(exact: bool, exact_with: tuple[tuple[str, str], ...]) -> Mapping[str, object]:
    # Quantised weights give other answers in any mode.
    return {"exact": exact, **{name: value for name, value in exact_with if exact or name == "quantize"}}


def _hashes(prompt: Prompt, ids: list[int], options: AnswerOptions | None) -> tuple[str, str]:
    """Return the hash of all that decides the answer of ``prompt``, and the hash that seeds its draws.

    Without fields both are the hash of text and key. Fields change the answer's hash, not that of the draws;
    a seed of the line's own makes the draws independent of the line's place and id.
    """
    parts: list[object] = [prompt.key, prompt.text if prompt.messages is None else prompt.messages]
    answer_hash = draws_hash = hash_of(parts)
    if options is not None:
        answer_hash = hash_of([*parts, prompt.fields, asdict(options)])
        draws_hash = hash_of(ids) if options.has_seed else draws_hash
    return answer_hash, draws_hash


def hash_of(value: object) -> str:
    """Return a short hash of ``value``, which JSON can express; the same in every process."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:32]
