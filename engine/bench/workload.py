"""A file of prompts, answered by this job's ranks and by other engines with the same prompts."""

import json
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from xpar.comm.communicator import Communicator
from xpar.comm.failure import agreed
from xpar.engine.bench.decode_profile import timed_parts
from xpar.engine.generation.answer_file import is_failure, open_answer_file
from xpar.engine.generation.generate import generate, settle_room
from xpar.engine.generation.lockstep import Progress
from xpar.engine.generation.prompts import Prompt, prompt_form, read_prompts
from xpar.engine.generation.request import Request, Workload, check_ids, hash_of
from xpar.engine.generation.sampling import Sampling
from xpar.engine.generation.tokenizer import Tokenizer
from xpar.engine.generation.work_item import WorkItem
from xpar.engine.layer.stage_timer import MeasuringTimer
from xpar.engine.models.loaded_model import LoadedModel

MIXED = "mixed"
"""The name of the generated workload."""
MIXED_PROMPTS, MIXED_TOKENS, COMMON_TOKENS = 96, 24_703, 400
"""Prompts, tokens of all of them, and tokens with which every third begins."""
SHORTEST, LONGEST = 16, 840
"""Tokens of a prompt."""
SHARES = ("reading", "decoding", "attention", "experts", "waiting")
"""The parts of a run's time. ``reading``: steps that read prompts, with what is decoded in them.
``decoding``: the other steps. Within both, ``attention`` and ``experts``, on CPU ranks. ``waiting``: for the
other ranks, between steps and, on CPU ranks, for their rows."""


@dataclass(frozen=True)
class Answered:
    """The result of one side.

    Attributes:
        seconds: From the first prompt to the last answer; loading is not counted.
        first_s: Seconds until the first answer was complete, or None where a side does not tell.
        answers: The tokens of each answer, in the order of the prompts.
        peak_bytes: The most memory of each process.
        note: What a reader has to know of how this side ran.
    """

    seconds: float
    first_s: float | None
    answers: list[list[int]]
    peak_bytes: list[int]
    note: str = ""


def draw_mixed(vocab: int, seed: int) -> list[list[int]]:
    """Draw the workload ``mixed``: token ids of prompts, the same in every process.

    A third begins with the same tokens. Lengths are spread evenly on a logarithmic scale, and then scaled so
    that their sum is ``MIXED_TOKENS`` up to rounding.
    """
    generator = torch.Generator().manual_seed(seed)
    common = torch.randint(vocab, (COMMON_TOKENS,), generator=generator).tolist()
    beginnings = [common if n % 3 == 0 else [] for n in range(MIXED_PROMPTS)]
    most = [LONGEST - len(beginning) for beginning in beginnings]
    draws = torch.rand(MIXED_PROMPTS, generator=generator).tolist()
    own = [SHORTEST * (limit / SHORTEST) ** u for limit, u in zip(most, draws, strict=True)]
    wanted = MIXED_TOKENS - sum(map(len, beginnings))
    low, high = 0.0, float(LONGEST)
    while high - low > 1e-6:
        scale = (low + high) / 2
        if sum(_lengths(own, most, scale)) < wanted:
            low = scale
        else:
            high = scale
    lengths = _lengths(own, most, high)
    return [
        beginning + torch.randint(vocab, (length,), generator=generator).tolist()
        for beginning, length in zip(beginnings, lengths, strict=True)
    ]


def _encode(name: str, prompt: Prompt, tokenizer: Tokenizer) -> list[int]:
    """Encode a line of the file ``name``; ValueError, which names the line, for one that cannot be used."""
    try:
        if prompt.messages is not None:
            raise ValueError('has messages, for which not all sides have a template; give it a "prompt"')
        if prompt.fields:
            raise ValueError(
                f"has {', '.join(sorted(prompt.fields))}, and all sides draw --new-tokens tokens greedily "
                "for each line; leave a line's own fields out"
            )
        ids = tokenizer.encode(prompt.text)
        check_ids(ids, tokenizer)
    except ValueError as error:
        raise ValueError(f"--workload {name}: line {prompt.line}: {error}") from None
    return ids


def _lengths(own: Sequence[float], most: Sequence[int], scale: float) -> list[int]:
    return [min(limit, max(SHORTEST, round(scale * length))) for length, limit in zip(own, most, strict=True)]


def read_workload(
    comm: Communicator, name: str, tokenizer: Tokenizer, new_tokens: int, seed: int
) -> list[list[int]]:
    """Return the token ids of the prompts of ``mixed`` or of a file; collective.

    Raises:
        ValueError: The file has no prompts or a line that is none, or the model cannot take one of them.
    """
    read = agreed(comm, lambda: [] if comm.rank else _read(name, tokenizer, new_tokens, seed), patient=True)
    prompts: list[list[int]] = comm.all_gather_object(read)[0]
    return prompts


def _read(name: str, tokenizer: Tokenizer, new_tokens: int, seed: int) -> list[list[int]]:
    if name == MIXED:
        if tokenizer.vocabulary is None:
            raise ValueError(f"--workload {MIXED}: the configuration has no vocab_size; give a file")
        prompts = draw_mixed(tokenizer.vocabulary, seed)
    else:
        try:
            found, bad = read_prompts(Path(name), prompt_form)
        except OSError as error:
            raise ValueError(
                f"--workload {name}: {error.strerror}; give a file that rank 0 can read, or {MIXED}"
            ) from None
        if bad:
            raise ValueError(f"--workload {name}: line {bad[0].line}: {bad[0].error}")
        prompts = [_encode(name, prompt, tokenizer) for prompt in found]
    if not prompts:
        raise ValueError(f"--workload {name}: holds no prompt; give a file with one prompt per line")
    longest = max(map(len, prompts))
    if tokenizer.positions is not None and longest + new_tokens > tokenizer.positions:
        raise ValueError(
            f"--workload {name}: a prompt of {longest} tokens and {new_tokens} new ones, and the model has "
            f"positions for {tokenizer.positions}; shorten the prompts or --new-tokens"
        )
    return prompts


@dataclass
class StepClock:
    """The times of the steps of a run on this rank, from the callbacks of ``generate``.

    Attributes:
        begin: When the run began.
        first_s: Seconds until the first answer was complete.
        agreeing: Seconds between steps, in which ranks agree.
        steps: Of each step: seconds, tokens that this rank computed, tokens that the job drew.
    """

    begin: float = field(default_factory=time.perf_counter)
    first_s: float | None = None
    agreeing: float = 0.0
    steps: list[tuple[float, int, int]] = field(default_factory=list)
    _polled: float = 0.0
    _began: float | None = None
    _drawn: int = 0
    _computed: int = 0

    def poll(self) -> bool:
        """Note that a step has ended; the next is agreed on."""
        self._polled = time.perf_counter()
        return False

    def note_progress(self, progress: Progress) -> None:
        """Note that a step begins."""
        now = time.perf_counter()
        self.agreeing += now - self._polled
        if self._began is not None:
            self.steps.append((self._polled - self._began, self._computed, progress.tokens - self._drawn))
        if progress.done and self.first_s is None:
            self.first_s = now - self.begin
        self._began, self._drawn, self._computed = now, progress.tokens, 0

    def count(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Note the tokens of a forward, as a hook of the model."""
        ids = kwargs.get("input_ids", args[0] if args else None)
        self._computed += ids.numel() if isinstance(ids, torch.Tensor) else 0


def answer(
    comm: Communicator,
    loaded: LoadedModel,
    tokenizer: Tokenizer,
    request: Request,
    prompts: Sequence[list[int]],
    peak_bytes: Sequence[int] = (),
) -> tuple[Answered, dict[str, float]]:
    """Answer ``prompts`` as ``xpar generate`` does; return the answers and the seconds of ``SHARES``.

    Collective. No token ends an answer: each has ``request.max_new_tokens``. The shares are rank 0's. On a
    GPU, attention and experts have none: a replayed CUDA graph has no parts.
    """
    clock, timer, has_parts = StepClock(), MeasuringTimer(loaded.device), loaded.device.type == "cpu"
    with _answer_path(comm) as out, ExitStack() as stack:
        hook = loaded.model.register_forward_pre_hook(clock.count, with_kwargs=True)
        stack.callback(hook.remove)
        hooked = stack.enter_context(timed_parts(loaded, timer)) if has_parts else {}
        here = replace(request, out=out)
        comm.barrier()
        clock.begin = time.perf_counter()
        work = _work_of(prompts)
        here, _ = settle_room(comm, here, work, loaded)
        generate(comm, here, work, tokenizer, loaded, clock.poll, clock.note_progress)
        seconds = time.perf_counter() - clock.begin
        answers = comm.all_gather_object(agreed(comm, lambda: [] if comm.rank else _read_answers(out)))[0]
    spent = timer.read().seconds
    steps = comm.all_gather_object(clock.steps)
    computed = [sum(of_rank[n][1] for of_rank in steps) for n in range(len(clock.steps))]
    reading = sum(
        s for (s, _, drawn), all_ranks in zip(clock.steps, computed, strict=True) if all_ranks > drawn
    )
    shares = {
        "reading": reading,
        "decoding": sum(s for s, _, _ in clock.steps) - reading,
        "waiting": clock.agreeing + sum(spent[stage] for stage in ("plan", "dispatch", "combine", "finish")),
    }
    if has_parts:
        shares |= {"attention": hooked["attention"], "experts": spent["compute"] + spent["shared"]}
    return Answered(seconds, clock.first_s, answers, list(peak_bytes)), shares


def _work_of(prompts: Sequence[list[int]]) -> Workload:
    items = [WorkItem(Prompt(n, None, ""), ids, hash_of([n])) for n, ids in enumerate(prompts, start=1)]
    order = {item.hash: place for place, item in enumerate(items)}
    queue = sorted(items, key=lambda item: (-len(item.ids), item.prompt.line))
    return Workload(tuple(queue), order, 0, 0, "")


@contextmanager
def _answer_path(comm: Communicator) -> Iterator[Path]:
    """Yield a file of answers that rank 0 has opened in a folder of its own; collective."""
    with ExitStack() as stack:

        def open_file() -> Path:
            if comm.rank:
                return Path()
            out = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "answers.jsonl"
            open_answer_file(out, [])
            return out

        yield agreed(comm, open_file)


def _read_answers(out: Path) -> list[list[int]]:
    results = [json.loads(line) for line in out.read_text().splitlines()]
    failures = [result for result in results if is_failure(result)]
    if failures:
        raise ValueError(f"the model failed on prompt {failures[0]['line']}: {failures[0]['error']}")
    return [result["token_ids"] for result in sorted(results, key=lambda result: int(result["line"]))]


def compare(ours: Sequence[list[int]], theirs: Sequence[list[int]]) -> dict[str, int]:
    """Count the answers that are the same on both sides, and those whose first token is."""
    pairs = list(zip(ours, theirs, strict=True))
    return {"same": sum(a == b for a, b in pairs), "same_first": sum(a[:1] == b[:1] for a, b in pairs)}


def request_of(
    checkpoint: Path,
    new_tokens: int,
    batch: int | None,
    prefill_tokens: int | None,
    dtype: torch.dtype,
    exact: bool,
) -> Request:
    """Make the request of a greedy answer of ``new_tokens`` tokens to each prompt.

    ``batch``: sequences of a rank at a time. ``prefill_tokens``: of prompts that it reads in one step. None
    for either to choose as ``xpar generate`` does.
    """
    nowhere = Path()
    return Request(
        checkpoint, nowhere, nowhere, Sampling(), new_tokens, batch=batch, prefill_tokens=prefill_tokens,
        dtype=dtype, exact=exact,
    )  # fmt: skip
