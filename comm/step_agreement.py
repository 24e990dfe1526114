"""What the ranks tell each other before a step that all of them take together: one small exchange on the host."""

from dataclasses import dataclass

from xpar.comm.communicator import Communicator
from xpar.comm.handshake import Tag, handshake


@dataclass(frozen=True)
class StepFacts:
    """What every rank said, the same on every rank: ``tokens``, ``work`` and ``notes`` of each, ``status`` of all.

    ``tokens``: a rank's tokens in this step. ``work``: what is left for it to do, in the caller's units. ``status``:
    the bits that any rank has set. ``notes``: numbers of the caller's own, a row for each rank.
    """

    tokens: tuple[int, ...]
    work: tuple[int, ...]
    status: int
    notes: tuple[tuple[int, ...], ...]

    @property
    def max_tokens(self) -> int:
        """Of any rank: what a recorded graph or a padded batch must hold."""
        return max(self.tokens)

    @property
    def any_work(self) -> bool:
        """Whether the ranks must go on: those that have nothing left join the others' steps with no tokens."""
        return any(self.work)


def agree_step(
    comm: Communicator,
    step: int,
    *,
    tokens: int = 0,
    work: int = 0,
    status: int = 0,
    notes: tuple[int, ...] = (),
    failure: BaseException | None = None,
) -> StepFacts:
    """Exchange this rank's facts about ``step``; collective over ``comm``, idle ranks included.

    ``failure``: what went wrong on this rank since the last step; it still comes, and every rank raises one
    :class:`~xpar.comm.handshake.RemoteRankError`. Ranks that are in different steps get a ``DesyncError``.
    """
    table = handshake(comm, Tag("step", step=step), values=(tokens, work, status, *notes), failure=failure)
    rows = [tuple(int(n) for n in row) for row in table]
    union = 0
    for row in rows:
        union |= row[2]
    return StepFacts(
        tuple(row[0] for row in rows), tuple(row[1] for row in rows), union, tuple(row[3:] for row in rows)
    )
