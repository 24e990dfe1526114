"""What a rank writes down about one group's collectives as it enters and leaves them; a few microseconds each."""

import time
from array import array
from typing import Protocol

from xpar.comm.watchdog.deadlines import Deadlines
from xpar.comm.watchdog.status_board import CALL, INSIDE, OUTSIDE, ROW_BYTES, STATE, StatusBoard

FIRST_STEPS = 2
"""Steps of a layer up to and with this number may compile, and have the deadline of the start."""


class Pace:
    """Where this rank is, for all its groups: the layer and the step, and how long one may wait there."""

    def __init__(self, deadlines: Deadlines) -> None:
        self.deadlines = deadlines
        self.layer = self.step = -1
        self.seconds = deadlines.start

    def at(self, layer: int, step: int) -> None:
        """The collectives from now on belong to ``layer`` and ``step``; -1 says nothing new."""
        if step < 0:
            return
        self.layer, self.step = layer, step
        self.seconds = self.deadlines.start if step < FIRST_STEPS else self.deadlines.step


class Journal(Protocol):
    """What a communicator tells about itself."""

    compares: bool
    """Whether the ranks are to compare every collective before it begins."""

    def at(self, layer: int, step: int) -> None:
        """See :meth:`Pace.at`."""

    def begin(self) -> int:
        """Count one more collective of the group; its number, from 1."""

    def enter(
        self,
        seq: int,
        op: str,
        seconds: float | None = None,
        rows_out: int = 0,
        rows_in: int = 0,
        row_bytes: int = 0,
    ) -> None:
        """The rank waits for the others from now on, ``seconds`` at most; None: what the place has."""

    def leave(self) -> None:
        """It does not wait any more."""


class NoJournal:
    """Of a group that nobody watches."""

    compares = False

    def at(self, layer: int, step: int) -> None:
        return None

    def begin(self) -> int:
        return 0

    def enter(
        self,
        seq: int,
        op: str,
        seconds: float | None = None,
        rows_out: int = 0,
        rows_in: int = 0,
        row_bytes: int = 0,
    ) -> None:
        return None

    def leave(self) -> None:
        return None


class BoardJournal:
    """Writes to this rank's row of the node's board.

    ``waits``: seconds spent in each collective, where they are kept; only of steps after the first, and not in those
    that come after work of one rank's own.
    """

    def __init__(
        self, board: StatusBoard, group: str, pace: Pace, compares: bool, waits: "array[float] | None"
    ) -> None:
        self._memory, self._first = board.memory, board.mine * ROW_BYTES
        self.group, self._name, self._pace, self._seq = group, group.encode()[:32], pace, 0
        self.compares, self.waits = compares, waits
        self._entered, self._counts = 0.0, False

    def at(self, layer: int, step: int) -> None:
        self._pace.at(layer, step)

    def begin(self) -> int:
        self._seq += 1
        return self._seq

    def enter(
        self,
        seq: int,
        op: str,
        seconds: float | None = None,
        rows_out: int = 0,
        rows_in: int = 0,
        row_bytes: int = 0,
    ) -> None:
        pace = self._pace
        self._entered = now = time.monotonic()
        self._counts = seconds is None and pace.step >= FIRST_STEPS
        CALL.pack_into(
            self._memory,
            self._first,
            INSIDE,
            now,
            seq,
            pace.layer,
            pace.step,
            rows_out,
            rows_in,
            row_bytes,
            pace.seconds if seconds is None else seconds,
            op.encode()[:64],
            self._name,
        )

    def leave(self) -> None:
        now = time.monotonic()
        STATE.pack_into(self._memory, self._first, OUTSIDE, now)
        if self.waits is not None and self._counts:
            self.waits.append(now - self._entered)
