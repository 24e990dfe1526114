"""The interface of a rank's batch to the loop that all ranks run together."""

from collections.abc import Sequence
from typing import Protocol, TypeVar

from xpar.engine.models.loaded_model import LoadedModel

CAN_RECORD, CAN_REPLAY = 1, 2
"""The bits of a rank's readiness for a step that continues its rows."""


class Row(Protocol):
    """A prompt or text that is being processed.

    Attributes:
        place: Its number in the job's queue, from 0.
        failure: Why the model cannot answer or score it, or None.
    """

    place: int
    failure: str | None


R = TypeVar("R", bound=Row)


class UnrecordedSteps:
    """The methods of a batch none of whose steps are recorded."""

    _loaded: LoadedModel

    def slots(self) -> int:
        """Return how many (token, expert) pairs this rank's experts have computed."""
        return self._loaded.slots()

    def readiness(self) -> int:
        """Return 0: steps differ from each other."""
        return 0

    def agree(self, tokens: tuple[int, ...] | None, readiness: tuple[int, ...]) -> None:
        """Let the layers know the tokens of each rank."""
        self._loaded.expect(tokens)


class LocalBatch(Protocol[R]):
    """A rank's part of the job; in each step every rank calls one of ``begin``, ``advance`` and ``join``."""

    @property
    def occupied(self) -> int:
        """The number of rows that this rank has begun and not completed."""

    @property
    def tokens(self) -> int:
        """The number of tokens that were drawn or scored so far."""

    @property
    def next_tokens(self) -> int:
        """The number of tokens that the next ``advance`` computes; 0 where this rank would ``join``."""

    def wanted(self, most_rows: int) -> int:
        """Return how many rows this rank would begin now if it may have ``most_rows``."""

    def tokens_of(self, lengths: Sequence[int], continued: int) -> int:
        """Return how many tokens a rank computes that begins rows of ``lengths``; the same on every rank.

        ``continued``: its ``next_tokens``.
        """

    def slots(self) -> int:
        """Return how many (token, expert) pairs this rank's experts have computed."""

    def readiness(self) -> int:
        """Return whether this rank can record or replay the next step, in bits; 0 if neither."""

    def agree(self, tokens: tuple[int, ...] | None, readiness: tuple[int, ...]) -> None:
        """Note the readiness of all ranks for the next step; the arguments are the same on every rank.

        ``tokens``: the tokens that each rank computes in the step; None after the last step, when nothing is
        agreed any more.
        """

    def begin(self, new: list[R]) -> list[R]:
        """Read the rows ``new``; return those that are complete already."""

    def advance(self) -> list[R]:
        """Continue the rows that are not complete; return those that this completes."""

    def join(self) -> None:
        """Compute the other ranks' tokens without any of this rank's own."""
