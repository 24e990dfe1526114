"""What the loop that all ranks run together asks of a rank's sequences, whatever is done with them."""

from typing import Protocol, TypeVar

LAUNCH, RECORD, REPLAY = 0, 1, 2
"""How ready a rank is for a step that is recorded; all ranks do what the least ready one can."""


class Row(Protocol):
    """A prompt or text that is being worked on. ``place``: its number among the job's. ``failure``: why it cannot be, or None."""

    place: int
    failure: str | None


R = TypeVar("R", bound=Row)


class LocalBatch(Protocol[R]):
    """A rank's part of the job; in each step every rank calls one of ``begin``, ``advance`` and ``join``."""

    @property
    def occupied(self) -> int:
        """Slots of the batch in use."""

    @property
    def tokens(self) -> int:
        """How many were drawn or scored so far."""

    def slots(self) -> int:
        """(token, expert) pairs that this rank's experts have computed."""

    def readiness(self) -> int:
        """What this rank can do in the next step: ``LAUNCH``, ``RECORD`` or ``REPLAY`` it, or what comes before it."""

    def agree(self, tokens: tuple[int, ...] | None, readiness: tuple[int, ...]) -> None:
        """Take note of what all ranks said of the step that follows, the same on every rank.

        ``tokens``: of each rank, where every one continues what it has; None where somebody begins.
        """

    def begin(self, new: list[R]) -> list[R]:
        """Read ``new``; return those that are complete already."""

    def advance(self) -> list[R]:
        """Continue those that are not complete; return those that this completes."""

    def join(self) -> None:
        """Serve the other ranks' tokens."""
