"""When a step that continues sequences is recorded, and when the recording is replayed.

On several ranks a step is recorded by all of them together, and replayed by all or by none: what is recorded counts on
every rank's tokens. Each rank says in the step's agreement how ready it is, and all derive the same from what all said.
"""

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import TypeVar

from torch import Tensor

from xpar.engine.generation.decode_graph import PaddedDecodeStep, record, record_join
from xpar.engine.generation.steps import LAUNCH, RECORD, REPLAY
from xpar.engine.models.kv_cache import KvCache
from xpar.engine.models.loader import LoadedModel
from xpar.engine.models.parallelize import Layer

log = logging.getLogger("xpar.models")
PATIENCE = 8
"""Steps with the same sequences before one is recorded, which takes as long as about five of them."""
T = TypeVar("T")
Record = Callable[[PaddedDecodeStep], Callable[[], Tensor]]
RecordJoin = Callable[[], Callable[[], object]]


class DecodeGraph:
    """Continues sequences by replaying a step, where the same ones have gone on for a while.

    ``recorded``, ``joined``: how a step is recorded, and a step without sequences of this rank. A model that cannot be is
    found out at the first attempt, and goes on as before. ``refused``: why, then. ``replayed``: how many steps were.
    """

    def __init__(
        self, loaded: LoadedModel, recorded: Record | None = None, joined: RecordJoin | None = None
    ) -> None:
        counted = [layer.slot_counter.counted for layer in loaded.layers]
        self._loaded = loaded
        self._record = recorded or (lambda step: record(step, counted, loaded.device))
        self._record_join = joined or (lambda: record_join(loaded.join, counted, loaded.device))
        self._recording: tuple[PaddedDecodeStep, Callable[[], Tensor]] | None = None
        self._joining: Callable[[], object] | None = None
        self._past: KvCache | None = None
        self._steady = 0
        self._decided: int | None = None
        self._tokens: tuple[int, ...] | None = None
        self._recorded_for: tuple[int, ...] | None = None
        self.refused: str | None = None
        self.replayed = 0

    @classmethod
    def of(cls, loaded: LoadedModel) -> "DecodeGraph | None":
        """None where steps are not recorded: on host processors, and with layers that wait for the host in a step, as all do
        in exact mode and those of several ranks do, unless rows go straight into the peers' memory."""
        if loaded.device.type != "cuda" or not all(map(_is_recordable, loaded.layers)):
            return None
        return cls(loaded)

    # -- what all ranks decide together -----------------------------------------------------------------------

    def readiness(self, past: KvCache | None) -> int:
        """How ready this rank is to continue ``past``, or, with None, to serve the others' step without sequences."""
        if self.refused is not None:
            return LAUNCH
        if past is None:
            return REPLAY if self._joining is not None else RECORD
        if past is not self._past:
            return LAUNCH
        if self._recording is not None and self._recording[0].left:
            return REPLAY
        return RECORD if self._steady >= PATIENCE else LAUNCH

    def agree(self, tokens: tuple[int, ...] | None, readiness: tuple[int, ...]) -> None:
        """Decide on the step that follows from what every rank said; without this call a single rank decides alone."""
        self._tokens = tokens
        self._decided = LAUNCH if tokens is None else min(readiness)
        if self._decided == REPLAY and tokens != self._recorded_for:
            self._decided = RECORD
        if self._decided != REPLAY:
            self._recording = self._joining = None

    # -- the step ------------------------------------------------------------------------------------------------

    def step(self, ids: Tensor, past: KvCache) -> tuple[Tensor, KvCache] | None:
        """Logits [B, V] after ``ids`` [B, 1], and what ``past`` becomes; None where the step is not to be replayed."""
        if past is not self._past:  # other sequences, or continued by somebody else
            self._recording, self._steady = None, 0
        if self._recording is not None and not self._recording[0].left:
            self._recording = None
        if self._is_to_record():
            self._begin(past)
        if self._recording is None:
            return None
        step, replay = self._recording
        logits, self._past = step(ids, replay)
        self.replayed += 1
        return logits, self._past

    def went_on(self, past: KvCache) -> None:
        """The same sequences were continued by a forward that was not replayed, and ``past`` came of it."""
        self._past = past
        self._steady += 1

    def join(self) -> bool:
        """Serve the other ranks' step without sequences of one's own; False where it is not to be replayed."""
        self._recording, self._past, self._steady = None, None, 0
        if self._decided == RECORD:
            self._joining = self._attempt(self._record_join)
        if self._joining is None:
            return False
        self._joining()
        self.replayed += 1
        return True

    def _is_to_record(self) -> bool:
        if self._decided is not None:
            return self._decided == RECORD
        return self._recording is None and self.refused is None and self._steady >= PATIENCE

    def _begin(self, past: KvCache) -> None:
        step = PaddedDecodeStep(self._loaded.model, self._loaded.device, past)
        replay = self._attempt(lambda: self._record(step))
        self._recording = None if replay is None else (step, replay)

    def _attempt(self, attempt: Callable[[], T]) -> T | None:
        """Return what ``attempt`` recorded; None on all ranks where one could not, which then is not tried again."""
        found, problem = None, None
        try:
            with _watch_paused(self._loaded):
                found = attempt()
        except RuntimeError as error:
            problem = str(error).splitlines()[0]
        problems = self._everyones(problem)
        self._recorded_for = self._tokens
        if not any(problems):
            return found
        self.refused = next(
            text if len(problems) == 1 else f"rank {rank}: {text}"
            for rank, text in enumerate(problems)
            if text
        )
        log.info("steps are not recorded: %s", self.refused)
        return None

    def _everyones(self, problem: str | None) -> list[str | None]:
        if self._decided is None or not self._loaded.layers:
            return [problem]
        return list(self._loaded.layers[0].runner.grid.world.comm.all_gather_object(problem))


def _is_recordable(layer: Layer) -> bool:
    runner = layer.runner
    if runner.dispatcher.capabilities.takes_slots:
        return True
    return not runner.options.exact and runner.grid.world.size == 1


def _watch_paused(loaded: LoadedModel) -> AbstractContextManager[object]:
    """The transport's watching thread must not ask about events while this one records."""
    transport = loaded.layers[0].runner.grid.transport if loaded.layers else None
    return nullcontext() if transport is None or transport.watch is None else transport.watch.paused()
