"""The decision when a decoding step is recorded, and when the recording is replayed.

Several ranks record a step together, and all or none of them replay it. The recording of every rank has the
same number of rows, its bucket: the largest number of sequences of any rank, rounded up. Each rank tells its
readiness in the step's agreement, and all derive the same decision from it.
"""

from collections.abc import Callable
from typing import TypeVar

from torch import Tensor

from xpar.engine.generation.decode_graph import PaddedDecodeStep, record, record_join
from xpar.engine.generation.recordings import (
    PATIENCE,
    attempt_on_all,
    bucket_of,
    follow_replay,
    is_recordable,
)
from xpar.engine.generation.steps import CAN_RECORD, CAN_REPLAY
from xpar.engine.models.loaded_model import LoadedModel
from xpar.engine.models.step_memory import Past

LAUNCH, RECORD, REPLAY = 0, 1, 2
T = TypeVar("T")
Record = Callable[[PaddedDecodeStep], Callable[[], Tensor]]
RecordJoin = Callable[[int], Callable[[], object]]


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
        """Make one, or return None where steps are not recorded."""
        if not is_recordable(loaded):
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
        follow_replay(self._loaded)
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
        follow_replay(self._loaded)
        self.replayed += 1
        return True

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
        found, self.refused = attempt_on_all(self._loaded, attempt, self._decided is None)
        if found is None and self._tokens is not None:
            self._loaded.expect(self._tokens)  # this step is launched
        return found
