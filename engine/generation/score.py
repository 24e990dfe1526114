"""Scoring a file of texts on all ranks: the log-probability of each token after those before it."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from xpar.comm.communicator import Communicator
from xpar.comm.failure import agreed
from xpar.engine.generation.answer_form import Choice
from xpar.engine.generation.lockstep import Progress
from xpar.engine.generation.request import ScoreRequest, Workload
from xpar.engine.generation.run_file import BatchLimits, RunSummary, process_file
from xpar.engine.generation.score_batch import ScoreBatch, ScoredText
from xpar.engine.generation.work_item import WorkItem
from xpar.engine.models.loaded_model import LoadedModel

DIGITS = 6
"""After the point, of a log-probability in the file: what float32 can tell apart."""


def score(
    comm: Communicator,
    request: ScoreRequest,
    work: Workload,
    loaded: LoadedModel,
    stop_requested: Callable[[], bool] = lambda: False,
    on_progress: Callable[[Progress], None] = lambda progress: None,
) -> RunSummary:
    """Score the texts of ``work.queue`` into ``request.out``, as :func:`process_file` says. Collective."""
    return process_file(
        comm,
        request,
        work,
        ScoreBatch(loaded, request.batch, request.prefill_tokens),
        ScoreRows(),
        BatchLimits(request.batch, request.prefill_tokens),
        stop_requested,
        on_progress,
    )


class Total(NamedTuple):
    """The number of scored tokens of a file, and the sum of their log-probabilities."""

    tokens: int
    logprob: float

    @property
    def perplexity(self) -> float | None:
        return perplexity(self.tokens, self.logprob)


def read_total(comm: Communicator, out: Path) -> Total:
    """Read the total of all scores in ``out`` on rank 0, for all ranks. Collective."""

    def read() -> Total:
        if comm.rank:
            return Total(0, 0.0)
        with open(out, encoding="utf-8") as file:
            results = [json.loads(line) for line in file]
        return Total(sum(r["tokens"] for r in results), math.fsum(r["sum"] for r in results))

    total: Total = comm.all_gather_object(agreed(comm, read))[0]
    return total


def perplexity(tokens: int, logprob: float) -> float | None:
    """Return exp of the mean negative log-probability; None without tokens, or beyond the largest float."""
    try:
        return math.exp(-logprob / tokens)
    except (ZeroDivisionError, OverflowError):
        return None


def logprobs_of(scored: ScoredText) -> list[float]:
    """Return the log-probabilities of a complete text; RuntimeError unless each wanted token has one."""
    asked = len(scored.ids) - scored.first
    if len(scored.logprobs) != asked:
        raise RuntimeError(
            f"{len(scored.logprobs)} tokens scored of {asked} that were asked for; report this"
        )
    return scored.logprobs


class ScoreRows:
    """The rows of a file's texts: how each begins, and the log-probabilities of a complete one."""

    def start(self, place: int, item: WorkItem) -> ScoredText:
        """Make the row of ``item``, at ``place`` of the queue."""
        return ScoredText(place, item.ids, item.first)

    def make_choice(self, row: ScoredText) -> Choice:
        """Make log-probabilities, their sum and the perplexity of a complete ``row``."""
        logprobs = [round(logprob, DIGITS) for logprob in logprobs_of(row)]
        total = math.fsum(logprobs)
        return {
            "tokens": len(logprobs),
            "sum": round(total, DIGITS),
            "perplexity": perplexity(len(logprobs), total),
            "greedy": row.greedy,
            "token_ids": row.ids[row.first :],
            "logprobs": logprobs,
        }
