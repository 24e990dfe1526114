"""A loaded model that one program asks, on rank 0, while the other ranks serve: for what cannot run on all of them.

Questions come as tokens and are answered in memory, by the same loop that works through a file.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from xpar.comm.communicator import Communicator
from xpar.engine.generation.decode_batch import DecodeBatch, RunningSequence, StopConditions
from xpar.engine.generation.generate import stop_test
from xpar.engine.generation.lockstep import LockstepCallbacks, Record, run_lockstep
from xpar.engine.generation.recorder import DecodeGraph
from xpar.engine.generation.sampling import Sampling
from xpar.engine.generation.score_batch import ScoreBatch, ScoredText
from xpar.engine.generation.steps import LocalBatch, R
from xpar.engine.generation.tokenizer import Tokenizer, first_stop
from xpar.engine.models.loader import LoadedModel


@dataclass(frozen=True)
class Continuations:
    """To be scored: ids[first:] of each (ids, first). Answer: the sum of log-probabilities, and whether it is greedy."""

    texts: tuple[tuple[list[int], int], ...]


@dataclass(frozen=True)
class Prompts:
    """To be answered, alike: tokens of each prompt. Answer: its text, cut at the first of ``stops``."""

    prompts: tuple[list[int], ...]
    max_new_tokens: int
    stops: tuple[str, ...] = ()
    sampling: Sampling = field(default_factory=Sampling)


class Service:
    """``batch``, ``prefill_tokens``: as for :class:`~xpar.engine.generation.request.Request`.

    Rank 0 calls :meth:`ask` as often as it likes and then :meth:`end`; every other rank calls :meth:`serve`.
    """

    def __init__(
        self, comm: Communicator, loaded: LoadedModel, tokens: Tokenizer, batch: int, prefill_tokens: int
    ) -> None:
        self.comm, self.loaded, self.tokens = comm, loaded, tokens
        self.batch, self.prefill_tokens = batch, prefill_tokens

    def ask(self, question: Continuations | Prompts) -> list[Any]:
        """The answer to each part of ``question``, in order."""
        self._tell(question)
        return self._work(question)

    def end(self) -> None:
        """Let the others return from :meth:`serve`."""
        self._tell(None)

    def serve(self) -> None:
        """Answer what rank 0 asks, until it ends."""
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
            return ScoredText(place, ids, first)

        def value(scored: ScoredText) -> Record:
            return {"place": scored.place, "value": (sum(scored.logprobs), scored.greedy)}

        steps = ScoreBatch(self.loaded, self.batch, self.prefill_tokens)
        return self._run(steps, [ids for ids, _ in question.texts], start, value)

    def _answer(self, question: Prompts) -> list[Any]:
        stops, sampling = question.stops, question.sampling
        limits = StopConditions(question.max_new_tokens, self.tokens.ends, stop_test(stops, self.tokens))

        def start(place: int) -> RunningSequence:
            ids = question.prompts[place]
            return RunningSequence(place, ids, sampling.generator(str(ids)))

        def value(running: RunningSequence) -> Record:
            text = self.tokens.decode(running.answer)
            return {"place": running.place, "value": text[: first_stop(text, stops)]}

        return self._run(
            DecodeBatch(self.loaded, sampling, limits, DecodeGraph.of(self.loaded)),
            question.prompts,
            start,
            value,
        )

    def _run(
        self,
        steps: LocalBatch[R],
        ids: Sequence[list[int]],
        start: Callable[[int], R],
        value: Callable[[R], Record],
    ) -> list[Any]:
        """The value of each of ``ids``, on rank 0, of records with its place; longest first, so that no rank begins a long one last."""
        order = sorted(range(len(ids)), key=lambda place: -len(ids[place]))
        values: dict[int, Any] = {}

        def write(records: list[Record]) -> None:
            values.update((r["place"], r["value"]) for r in records)

        job = LockstepCallbacks(
            total=len(ids),
            start=lambda turn: start(order[turn]),
            at_once=lambda turn: max(1, self.prefill_tokens // max(1, len(ids[order[turn]]))),
            record=value,
            write=write,
            stop=lambda: False,
            tell=lambda progress: None,
        )
        run_lockstep(self.comm, steps, self.batch, job)
        return [values[place] for place in sorted(values)]
