"""When a step that continues sequences is recorded, and when the recording is replayed."""

import logging
from collections.abc import Callable

from torch import Tensor

from xpar.engine.generation.decode_graph import PaddedDecodeStep, record
from xpar.engine.models.kv_cache import KvCache
from xpar.engine.models.loader import LoadedModel

log = logging.getLogger("xpar.models")
PATIENCE = 8
"""Steps with the same sequences before one is recorded, which takes as long as about five of them."""
Record = Callable[[PaddedDecodeStep], Callable[[], Tensor]]


class DecodeGraph:
    """The replay of a recorded step, where the same sequences have gone on for a while.

    ``recorded``: how a step is recorded. A model that cannot be is found out at the first attempt, and goes
    on as before. ``refused``: why, then. ``replayed``: how many steps were.
    """

    def __init__(self, loaded: LoadedModel, recorded: Record | None = None) -> None:
        counted = [layer.slot_counter.counted for layer in loaded.layers]
        self._loaded = loaded
        self._record = recorded or (lambda step: record(step, counted, loaded.device))
        self._recording: tuple[PaddedDecodeStep, Callable[[], Tensor]] | None = None
        self._past: KvCache | None = None
        self._steady = 0
        self.refused: str | None = None
        self.replayed = 0

    @classmethod
    def of(cls, loaded: LoadedModel) -> "DecodeGraph | None":
        """Make one, or return None where steps are not recorded.

        Steps are not recorded on host processors, in exact mode, and with several ranks, whose agreement
        before each layer's exchange a recording would leave out."""
        if loaded.device.type != "cuda" or any(
            x.runner.options.exact or x.runner.grid.world.size > 1 for x in loaded.layers
        ):
            return None
        return cls(loaded)

    def step(self, ids: Tensor, past: KvCache) -> tuple[Tensor, KvCache] | None:
        """Replay a step: return logits [B, V] after ``ids`` [B, 1], and what ``past`` becomes.

        None where the step is not to be replayed.
        """
        if past is not self._past:  # other sequences, or continued by somebody else
            self._recording, self._steady = None, 0
        if self._recording is not None and not self._recording[0].left:
            self._recording = None
        if self._recording is None and self.refused is None and self._steady >= PATIENCE:
            self._begin(past)
        if self._recording is None:
            return None
        step, replay = self._recording
        logits, self._past = step(ids, replay)
        self.replayed += 1
        return logits, self._past

    def went_on(self, past: KvCache) -> None:
        """Note that a forward continued the same sequences without a replay and left ``past``."""
        self._past = past
        self._steady += 1

    def _begin(self, past: KvCache) -> None:
        step = PaddedDecodeStep(self._loaded.model, self._loaded.device, past)
        try:
            self._recording = step, self._record(step)
        except RuntimeError as error:
            self.refused = str(error).splitlines()[0]
            log.info("steps are not recorded: %s", self.refused)
