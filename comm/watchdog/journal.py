"""The journal of one group's collectives; an entry takes a few microseconds."""

import time
from array import array
from typing import Protocol

from xpar.comm.watchdog.deadlines import Deadlines
from xpar.comm.watchdog.status_board import CALL, INSIDE, OUTSIDE, ROW_BYTES, STATE, StatusBoard

FIRST_STEPS = 2
"""steps of a layer that may compile kernels, and have the deadline of the start"""


class StepDeadline:
    """The layer and step that this rank is in, and the seconds that a collective may take there."""

    def __init__(self, deadlines: Deadlines) -> None:
        self.deadlines = deadlines
        self.layer = self.step = -1
        self.seconds = deadlines.start

    def set_step(self, layer: int, step: int) -> None:
        """Count the collectives from now on to ``layer`` and ``step``; a step of -1 changes nothing."""
        if step < 0:
            return
        self.layer, self.step = layer, step
        self.seconds = self.deadlines.start if step < FIRST_STEPS else self.deadlines.step


class Journal(Protocol):
    """The record of a communicator's collectives; with ``checks_collectives`` ranks compare each of them."""

    checks_collectives: bool

    def set_step(self, layer: int, step: int) -> None:
        """Count the collectives from now on to ``layer`` and ``step``; a step of -1 changes nothing."""

    def next_seq(self) -> int:
        """Count one more collective of the group and return its number, from 1."""

    def enter(
        self,
        seq: int,
        op: str,
        seconds: float | None = None,
        rows_out: int = 0,
        rows_in: int = 0,
        row_bytes: int = 0,
    ) -> None:
        """Record that this rank begins to wait; ``seconds``: the deadline, None for the step's."""

    def leave(self) -> None:
        """Record that this rank has stopped waiting."""


class NoJournal:
    """The :class:`Journal` of a group that nothing watches."""

    checks_collectives = False

    def set_step(self, layer: int, step: int) -> None:
        return None

    def next_seq(self) -> int:
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
    """The :class:`Journal` that writes to this rank's row of the node's status board.

    Args:
        board: The status board.
        group: Name of the group.
        deadline: The deadline of the current step, the same object for all groups of this rank.
        checks_collectives: Whether the ranks compare every collective before it begins.
        waits: Takes the seconds spent in each collective, if they are recorded. Left out are the first steps
            and collectives that come after work of one rank alone.
    """

    def __init__(
        self,
        board: StatusBoard,
        group: str,
        deadline: StepDeadline,
        checks_collectives: bool,
        waits: "array[float] | None",
    ) -> None:
        self._memory, self._first = board.memory, board.local_rank * ROW_BYTES
        self.group, self._name, self._deadline, self._seq = group, group.encode()[:32], deadline, 0
        self.checks_collectives, self.waits = checks_collectives, waits
        self._entered, self._is_recorded = 0.0, False

    def set_step(self, layer: int, step: int) -> None:
        self._deadline.set_step(layer, step)

    def next_seq(self) -> int:
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
        deadline = self._deadline
        self._entered = now = time.monotonic()
        self._is_recorded = seconds is None and deadline.step >= FIRST_STEPS
        CALL.pack_into(
            self._memory,
            self._first,
            INSIDE,
            now,
            seq,
            deadline.layer,
            deadline.step,
            rows_out,
            rows_in,
            row_bytes,
            deadline.seconds if seconds is None else seconds,
            op.encode()[:64],
            self._name,
        )

    def leave(self) -> None:
        now = time.monotonic()
        STATE.pack_into(self._memory, self._first, OUTSIDE, now)
        if self.waits is not None and self._is_recorded:
            self.waits.append(now - self._entered)
