"""The decision when a decoding step is recorded, and when the recording is replayed.

Several ranks record a step together, and all or none of them replay it. The recording of every rank has the
same number of rows, its bucket: the largest number of sequences of any rank, rounded up. Each rank tells its
readiness in the step's agreement, and all derive the same decision from it.
"""

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import TypeVar

from torch import Tensor

from xpar.engine.generation.decode_graph import PaddedDecodeStep, record, record_join
from xpar.engine.generation.steps import CAN_RECORD, CAN_REPLAY
from xpar.engine.models.loaded_model import LoadedModel
from xpar.engine.models.parallelize import Layer
from xpar.engine.models.step_memory import Past

log = logging.getLogger("xpar.models")
PATIENCE = 8
"""Steps with the same sequences before one is recorded, which takes as long as about five of them."""
BUCKETS = (1, 2, 4, 8, 16, 24, 32, 48, 64)
BUCKET_STEP = 32
"""Rows between two buckets beyond the last of ``BUCKETS``."""
LAUNCH, RECORD, REPLAY = 0, 1, 2
T = TypeVar("T")
Record = Callable[[PaddedDecodeStep], Callable[[], Tensor]]
RecordJoin = Callable[[int], Callable[[], object]]


def bucket_of(sequences: int) -> int:
    """Return the rows of a recording for up to ``sequences`` sequences a rank."""
    fitting = next((bucket for bucket in BUCKETS if sequences <= bucket), None)
    return fitting or -(-sequences // BUCKET_STEP) * BUCKET_STEP


class DecodeGraph:
    """The recording of a decoding step, which sequences that change in number go on with within its bucket.

    ``recorded``, ``joined``: how a step is recorded, and a step of so many rows without sequences of this
    rank. A model that cannot be recorded is found out at the first attempt, and goes on as before.
    ``refused``: the reason, then. ``replayed``: how many steps were replayed.
    """

    def __init__(
        self, loaded: LoadedModel, recorded: Record | None = None, joined: RecordJoin | None = None
    ) -> None:
        layers = loaded.layers
        counted = [layer.slot_counter.counted for layer in layers]
        self._loaded = loaded
        self._record = recorded or (lambda step: record(step, counted, loaded.device))
        self._record_join = joined or (lambda rows: record_join(layers, rows, counted, loaded.device))
        self._recording: tuple[PaddedDecodeStep, Callable[[], Tensor]] | None = None
        self._joining: Callable[[], object] | None = None
        self._past: Past | None = None
        self._held: Past | None = None
        self._steady = self._roomy = self._bucket = 0
        self._decided: int | None = None
        self._tokens: tuple[int, ...] | None = None
        self.refused: str | None = None
        self.replayed = 0

    @classmethod
    def of(cls, loaded: LoadedModel) -> "DecodeGraph | None":
        """Make one, or return None where steps are not recorded.

        That is so on host processors, for a model that norms the outputs of slots, and with layers that wait
        for the host in a step: in exact mode, and with rows of several ranks that neither NCCL gathers nor
        kernels store in the peers' memory.
        """
        if loaded.device.type != "cuda" or not loaded.sends_tokens_once:
            return None
        if not all(map(_is_recordable, loaded.layers)):
            return None
        return cls(loaded)

    # -- the decision of all ranks ------------------------------------------------------------------

    def readiness(self, past: Past | None) -> int:
        """Return how ready this rank is to continue ``past``; with None, for a step without sequences."""
        if self.refused is not None:
            return 0
        if past is None:
            return CAN_RECORD | CAN_REPLAY * (self._recording is not None or self._joining is not None)
        is_steady = past is self._past and self._steady >= PATIENCE
        fits = self._recording is not None and self._recording[0].has_room(past)
        return CAN_RECORD * is_steady | CAN_REPLAY * fits

    def agree(self, tokens: tuple[int, ...] | None, readiness: tuple[int, ...]) -> None:
        """Decide on the next step by the readiness of all ranks; a single rank needs no such call."""
        self._tokens = tokens
        self._decided = LAUNCH if tokens is None else self._decide(max(tokens), readiness)
        if tokens is not None and self._decided != LAUNCH:
            self._loaded.expect((self._bucket,) * len(tokens))

    def _decide(self, sequences: int, readiness: tuple[int, ...]) -> int:
        """Choose from facts that all ranks agree on; ``sequences``: the most of any rank.

        A recording with room for twice as many sequences is replaced once that has lasted.
        """
        bucket = bucket_of(sequences)
        self._roomy = self._roomy + 1 if 2 * bucket <= self._bucket else 0
        can_record = all(ready & CAN_RECORD for ready in readiness)
        can_replay = bucket <= self._bucket and all(ready & CAN_REPLAY for ready in readiness)
        if can_replay and not (can_record and self._roomy >= PATIENCE):
            return REPLAY
        if not can_record:
            return LAUNCH
        self._bucket = bucket
        return RECORD

    # -- the step -----------------------------------------------------------------------------------

    def step(self, ids: Tensor, past: Past) -> tuple[Tensor, Past] | None:
        """Replay a step: return logits [B, V] after ``ids`` [B, 1], and what ``past`` becomes.

        None where the step is not to be replayed.
        """
        decided = self._decided
        if decided is None:
            decided = self._decide(len(past.lengths), (self.readiness(past),))
        if past is not self._past:  # other sequences, or continued by somebody else
            self._steady = 0
        if decided == RECORD:
            self._begin(past)
        if decided == LAUNCH or self._recording is None:
            return None
        step, replay = self._recording
        if past is not self._held:
            step.load(past)
        logits, self._held = step(ids, replay)
        self._follow()
        self.went_on(self._held)
        self.replayed += 1
        return logits, self._held

    def went_on(self, past: Past) -> None:
        """Note that a forward continued the same sequences and left ``past``."""
        self._past = past
        self._steady += 1

    def join(self) -> bool:
        """Replay the step of a rank without sequences; return False where it is not to be replayed."""
        self._past, self._held, self._steady = None, None, 0
        if self._decided == RECORD:
            self._recording, self._joining = None, None
            self._joining = self._attempt(lambda: self._record_join(self._bucket))
        if self._decided == LAUNCH or (self._recording is None and self._joining is None):
            return False
        if self._recording is not None:
            step, replay = self._recording
            step.idle(replay)
        elif self._joining is not None:
            self._joining()
        self._follow()
        self.replayed += 1
        return True

    def _follow(self) -> None:
        """Give the replay a deadline where it waits for peers in NCCL; one-sided kernels have their own."""
        runner = self._loaded.layers[0].runner if self._loaded.layers else None
        if runner is None or runner.grid.transport is None:
            return
        if runner.dispatcher.capabilities.needs_transport and runner.grid.world.size > 1:
            runner.grid.transport.follow("a recorded step")

    def _begin(self, past: Past) -> None:
        self._recording = self._joining = self._held = None  # frees its memory
        loaded = self._loaded

        def attempt() -> tuple[PaddedDecodeStep, Callable[[], Tensor]]:
            step = PaddedDecodeStep(loaded.model, loaded.device, past, self._bucket, loaded.layers)
            return step, self._record(step)

        self._recording = self._attempt(attempt)
        self._held = past

    def _attempt(self, attempt: Callable[[], T]) -> T | None:
        """Return the recording; None on all ranks where one of them failed, which is not tried again."""
        found, problem = None, None
        try:
            with _watch_paused(self._loaded):
                found = attempt()
        except RuntimeError as error:
            problem = str(error).splitlines()[0]
        problems = self._everyones(problem)
        if not any(problems):
            return found
        self.refused = next(
            text if len(problems) == 1 else f"rank {rank}: {text}"
            for rank, text in enumerate(problems)
            if text
        )
        log.info("steps are not recorded: %s", self.refused)
        if self._tokens is not None:
            self._loaded.expect(self._tokens)  # this step is launched
        return None

    def _everyones(self, problem: str | None) -> list[str | None]:
        if self._decided is None or not self._loaded.layers:
            return [problem]
        return list(self._loaded.layers[0].runner.grid.world.comm.all_gather_object(problem))


def _is_recordable(layer: Layer) -> bool:
    runner = layer.runner
    can, transport = runner.dispatcher.capabilities, runner.grid.transport
    if can.takes_slots or runner.options.exact:
        return can.takes_slots
    if runner.grid.world.size == 1:
        return True
    return can.graph_capture and transport is not None and transport.choice.name == "nccl"


def _watch_paused(loaded: LoadedModel) -> AbstractContextManager[object]:
    """The transport's watching thread must not ask about events while this one records."""
    transport = loaded.layers[0].runner.grid.transport if loaded.layers else None
    return nullcontext() if transport is None or transport.watch is None else transport.watch.paused()
