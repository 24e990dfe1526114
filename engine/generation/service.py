"""The service of a loaded model to a program on rank 0, by the same loop that works through a file."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from xpar.comm.communicator import Communicator
from xpar.comm.failure import agreed
from xpar.engine.generation.choose_batch import choose_batch
from xpar.engine.generation.detokenizer import Stops
from xpar.engine.generation.flat_batch import FlatBatch
from xpar.engine.generation.kv_memory import BatchRoom
from xpar.engine.generation.lockstep import LockstepCallbacks, Record, run_lockstep
from xpar.engine.generation.logits_processors import make_processors
from xpar.engine.generation.request import check_ids
from xpar.engine.generation.running_sequence import RunningSequence, StopConditions
from xpar.engine.generation.sampling import Sampling
from xpar.engine.generation.score import logprobs_of
from xpar.engine.generation.score_batch import ScoreBatch, ScoredText
from xpar.engine.generation.steps import LocalBatch, R
from xpar.engine.generation.tokenizer import Tokenizer
from xpar.engine.models.loader import LoadedModel


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
        self, comm: Communicator, loaded: LoadedModel, tokens: Tokenizer, batch: int, prefill_tokens: int
    ) -> None:
        self.comm, self.loaded, self.tokens = comm, loaded, tokens
        self.batch, self.prefill_tokens = batch, prefill_tokens

    def ask(self, question: Continuations | Prompts) -> list[Any]:
        """Answer each part of ``question``, in order; one error on every rank names a part that cannot be."""
        self._tell(question)
        return self._work(question)

    def end(self) -> None:
        """Let the other ranks return from :meth:`serve`."""
        self._tell(None)

    def serve(self) -> None:
        """Answer the questions of rank 0 until it calls :meth:`end`."""
        while (question := self._tell(None)) is not None:
            self._work(question)

    def _tell(self, question: Continuations | Prompts | None) -> Continuations | Prompts | None:
        self.comm.barrier(patient=True)  # the program between two questions may take long
        told: Continuations | Prompts | None = self.comm.all_gather_object(question)[0]
        return told

    def _work(self, question: Continuations | Prompts) -> list[Any]:
        return self._score(question) if isinstance(question, Continuations) else self._answer(question)

    def _score(self, question: Continuations) -> list[Any]:
        def start(place: int) -> ScoredText:
            ids, first = question.texts[place]
            # As the harness's own models do: what is read is the whole text.
            return ScoredText(place, ids, first, length=len(ids) - 1)

        def value(scored: ScoredText) -> Record:
            return {"place": scored.place, "value": (sum(logprobs_of(scored)), scored.greedy)}

        steps = ScoreBatch(self.loaded, self.batch, self.prefill_tokens)
        return self._run(steps, [ids for ids, _ in question.texts], start, value)

    def _answer(self, question: Prompts) -> list[Any]:
        stops, sampling, most = Stops(question.stops), question.sampling, question.max_new_tokens
        limits = StopConditions(most, self.tokens.ends)
        detokenizer = self.tokens.detokenizer(in_context=False)

        def start(place: int) -> RunningSequence:
            ids = question.prompts[place]
            processors = make_processors(dict(sampling.settings), ids, most, self.tokens.ends)
            stopped = detokenizer.stop_test(ids, stops)
            generator = sampling.generator(str(ids))
            return RunningSequence(place, ids, generator, processors=processors, stopped=stopped)

        def value(running: RunningSequence) -> Record:
            return {
                "place": running.place,
                "value": detokenizer.cut(running.ids, running.answer, stops),
            }

        lengths = [len(ids) + most for ids in question.prompts]
        room = BatchRoom(self.batch, self.prefill_tokens, lengths=lengths)
        return self._run(
            choose_batch(self.loaded, sampling, limits, room=room), question.prompts, start, value, most
        )

    def _run(
        self,
        steps: LocalBatch[R],
        ids: Sequence[list[int]],
        start: Callable[[int], R],
        value: Callable[[R], Record],
        drawn: int = 0,
    ) -> list[Any]:
        """Compute the value of each of ``ids``, longest first; rank 0 gets the values of all."""
        agreed(self.comm, lambda: self._check(ids))
        order = sorted(range(len(ids)), key=lambda place: -len(ids[place]))
        values: dict[int, Any] = {}
        failures: dict[int, str] = {}

        def write(records: list[Record]) -> None:
            failures.update((r["place"], r["failure"]) for r in records if "failure" in r)
            values.update((r["place"], r["value"]) for r in records if "value" in r)

        job = LockstepCallbacks(
            total=len(ids),
            start=lambda turn: start(order[turn]),
            length=lambda turn: len(ids[order[turn]]),
            at_once=lambda turn: max(1, self.prefill_tokens // max(1, len(ids[order[turn]]))),
            record=lambda row: _record(row, value),
            write=write,
            stop=lambda: False,
            tell=lambda progress: None,
            deal=steps.dealer([ids[place] for place in order], self.comm.size, [drawn] * len(order))
            if isinstance(steps, FlatBatch)
            else None,
        )
        run_lockstep(self.comm, steps, self.batch, job)
        agreed(self.comm, lambda: _refuse(failures, len(ids)))
        return [values[place] for place in sorted(values)]

    def _check(self, ids: Sequence[list[int]]) -> None:
        for place, tokens in enumerate(ids):
            try:
                check_ids(tokens, self.tokens)
            except ValueError as error:
                raise ValueError(f"text {place + 1} of {len(ids)}: {error}") from None


def _record(row: R, value: Callable[[R], Record]) -> Record:
    """Make the record of ``row``; an error there must not leave the other ranks waiting."""
    failure = row.failure
    if failure is None:
        try:
            return value(row)
        except Exception as error:  # noqa: BLE001 - raised once all are done, on every rank
            failure = f"its answer cannot be given ({type(error).__name__}: {error})"
    return {"place": row.place, "failure": failure}


def _refuse(failures: Mapping[int, str], total: int) -> None:
    """Raise ValueError for failures: numbers without those texts would be of another set."""
    if failures:
        place = min(failures)
        more = f" (and {len(failures) - 1} more)" if len(failures) > 1 else ""
        raise ValueError(f"text {place + 1} of {total}{more}: {failures[place]}")
