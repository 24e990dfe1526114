"""The service of a loaded model to a program on rank 0, by the same loop that works through a file."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from xpar.comm.communicator import Communicator
from xpar.comm.failure import agreed
from xpar.engine.generation.answer_form import Result
from xpar.engine.generation.choose_batch import choose_batch
from xpar.engine.generation.detokenizer import Stops
from xpar.engine.generation.flat_batch import FlatBatch
from xpar.engine.generation.kv_memory import BatchRoom
from xpar.engine.generation.lockstep import LockstepCallbacks, run_lockstep
from xpar.engine.generation.logits_processors import make_processors
from xpar.engine.generation.request import check_ids
from xpar.engine.generation.running_sequence import RunningSequence, StopConditions
from xpar.engine.generation.sampling import Sampling
from xpar.engine.generation.score import logprobs_of
from xpar.engine.generation.score_batch import ScoreBatch, ScoredText
from xpar.engine.generation.steps import LocalBatch, R
from xpar.engine.generation.tokenizer import Tokenizer
from xpar.engine.models.loaded_model import LoadedModel


@dataclass(frozen=True)
class Continuations:
    """A request to score ids[first:] of each (ids, first): sum of log-probabilities, and if greedy."""

    texts: tuple[tuple[list[int], int], ...]


@dataclass(frozen=True)
class Prompts:
    """A request to answer prompts of tokens, by texts of the answer's tokens alone, cut at ``stops``."""

    prompts: tuple[list[int], ...]
    max_new_tokens: int
    stops: tuple[str, ...] = ()
    sampling: Sampling = field(default_factory=Sampling)


class Service:
    """The service of a loaded model; ``batch`` and ``prefill_tokens`` are those of a Request.

    Rank 0 calls :meth:`ask` as often as it likes and then :meth:`end`; every other rank calls :meth:`serve`.
    """

    def __init__(
        self, comm: Communicator, loaded: LoadedModel, tokenizer: Tokenizer, batch: int, prefill_tokens: int
    ) -> None:
        self.comm, self.loaded, self.tokenizer = comm, loaded, tokenizer
        self.batch, self.prefill_tokens = batch, prefill_tokens

    def ask(self, request: Continuations | Prompts) -> list[Any]:
        """Answer each part of ``request``, in order; one error on every rank names a part that cannot be."""
        self._broadcast(request)
        return self._work(request)

    def end(self) -> None:
        """Let the other ranks return from :meth:`serve`."""
        self._broadcast(None)

    def serve(self) -> None:
        """Answer the requests of rank 0 until it calls :meth:`end`."""
        while (request := self._broadcast(None)) is not None:
            self._work(request)

    def _broadcast(self, request: Continuations | Prompts | None) -> Continuations | Prompts | None:
        self.comm.barrier(patient=True)  # the program between two requests may take long
        everyones: list[Continuations | Prompts | None] = self.comm.all_gather_object(request)
        return everyones[0]

    def _work(self, request: Continuations | Prompts) -> list[Any]:
        return self._score(request) if isinstance(request, Continuations) else self._answer(request)

    def _score(self, request: Continuations) -> list[Any]:
        def start(place: int) -> ScoredText:
            ids, first = request.texts[place]
            # As the harness's own models do: what is read is the whole text.
            return ScoredText(place, ids, first, length=len(ids) - 1)

        def make_result(scored: ScoredText) -> Result:
            return {"place": scored.place, "value": (sum(logprobs_of(scored)), scored.greedy)}

        batch = ScoreBatch(self.loaded, self.batch, self.prefill_tokens)
        return self._run(batch, [ids for ids, _ in request.texts], start, make_result)

    def _answer(self, request: Prompts) -> list[Any]:
        stops, sampling, most = Stops(request.stops), request.sampling, request.max_new_tokens
        stop_conditions = StopConditions(most, self.tokenizer.ends)
        detokenizer = self.tokenizer.detokenizer(in_context=False)

        def start(place: int) -> RunningSequence:
            ids = request.prompts[place]
            processors = make_processors(dict(sampling.settings), ids, most, self.tokenizer.ends)
            stopped = detokenizer.stop_test(ids, stops)
            generator = sampling.generator(str(ids))
            return RunningSequence(place, ids, generator, processors=processors, stopped=stopped)

        def make_result(running: RunningSequence) -> Result:
            return {
                "place": running.place,
                "value": detokenizer.cut(running.ids, running.answer, stops),
            }

        lengths = [len(ids) + most for ids in request.prompts]
        room = BatchRoom(self.batch, self.prefill_tokens, lengths=lengths)
        batch = choose_batch(self.loaded, sampling, stop_conditions, room=room)
        return self._run(batch, request.prompts, start, make_result, most)

    def _run(
        self,
        batch: LocalBatch[R],
        ids: Sequence[list[int]],
        start: Callable[[int], R],
        make_result: Callable[[R], Result],
        drawn: int = 0,
    ) -> list[Any]:
        """Compute the value of each of ``ids``, longest first; rank 0 gets the values of all."""
        agreed(self.comm, lambda: self._check(ids))
        order = sorted(range(len(ids)), key=lambda place: -len(ids[place]))
        values: dict[int, Any] = {}
        failures: dict[int, str] = {}

        def write(results: list[Result]) -> None:
            failures.update((r["place"], r["failure"]) for r in results if "failure" in r)
            values.update((r["place"], r["value"]) for r in results if "value" in r)

        job = LockstepCallbacks(
            total=len(ids),
            start=lambda turn: start(order[turn]),
            length=lambda turn: len(ids[order[turn]]),
            at_once=lambda turn: max(1, self.prefill_tokens // max(1, len(ids[order[turn]]))),
            make_result=lambda row: _make_result(row, make_result),
            write=write,
            stop=lambda: False,
            report_progress=lambda progress: None,
            deal=batch.dealer([ids[place] for place in order], self.comm.size, [drawn] * len(order))
            if isinstance(batch, FlatBatch)
            else None,
        )
        run_lockstep(self.comm, batch, self.batch, job)
        agreed(self.comm, lambda: _refuse(failures, len(ids)))
        return [values[place] for place in sorted(values)]

    def _check(self, ids: Sequence[list[int]]) -> None:
        for place, prompt in enumerate(ids):
            try:
                check_ids(prompt, self.tokenizer)
            except ValueError as error:
                raise ValueError(f"text {place + 1} of {len(ids)}: {error}") from None


def _make_result(row: R, make: Callable[[R], Result]) -> Result:
    """Make the result of ``row``; an error there must not leave the other ranks waiting."""
    failure = row.failure
    if failure is None:
        try:
            return make(row)
        except Exception as error:  # noqa: BLE001 - raised once all are done, on every rank
            failure = f"its answer cannot be given ({type(error).__name__}: {error})"
    return {"place": row.place, "failure": failure}


def _refuse(failures: Mapping[int, str], total: int) -> None:
    """Raise ValueError for failures: numbers without those texts would be of another set."""
    if failures:
        place = min(failures)
        more = f" (and {len(failures) - 1} more)" if len(failures) > 1 else ""
        raise ValueError(f"text {place + 1} of {total}{more}: {failures[place]}")
