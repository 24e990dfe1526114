"""The small exchange on the host before a step that all ranks take together."""

from dataclasses import dataclass

from xpar.comm.communicator import Communicator, Tag
from xpar.comm.handshake import handshake


@dataclass
class AgreedStep:
    """The facts about the current step that its layers need not exchange any more.

    Attributes:
        tokens: Tokens of each rank of the ``moe`` group in every layer of the step; None where the ranks of a
            layer must agree for themselves.
    """

    tokens: tuple[int, ...] | None = None


@dataclass(frozen=True)
class StepFacts:
    """The facts of all ranks about one step, the same on every rank.

    Attributes:
        tokens: Number of tokens of each rank in this step.
        work: Work that is left for each rank, in the caller's units.
        status: The bits that any rank has set.
        notes: Further numbers of the caller, one tuple per rank.
    """

    tokens: tuple[int, ...]
    work: tuple[int, ...]
    status: int
    notes: tuple[tuple[int, ...], ...]

    @property
    def any_work(self) -> bool:
        """Return whether any rank has work left; ranks without work then join the step with no tokens."""
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

    The arguments are this rank's part of :class:`StepFacts`. ``failure``: an error of this rank since the
    last step; the rank still takes part, and every rank raises.

    Raises:
        RemoteRankError: A rank gave a ``failure``.
        DesyncError: The ranks are in different steps.
    """
    table = handshake(comm, Tag("step", step=step), values=(tokens, work, status, *notes), failure=failure)
    rows = [tuple(int(n) for n in row) for row in table]
    union = 0
    for row in rows:
        union |= row[2]
    return StepFacts(
        tuple(row[0] for row in rows), tuple(row[1] for row in rows), union, tuple(row[3:] for row in rows)
    )
