"""Where the ranks of a job are, and what one node asks another about them."""

from dataclasses import dataclass

from xpar.comm.watchdog.report import RankState
from xpar.comm.watchdog.status_board import Call
from xpar.comm.watchdog.wire import Address


@dataclass(frozen=True)
class RankAddress:
    """A rank of the job: its node, where on it, where it listens if there are other nodes, and whether its death is felt."""

    host: str
    node: int
    local_rank: int
    address: Address | None
    armed: bool


@dataclass(frozen=True)
class SurveyRequest:
    """To another node: where are your ranks? With ``code`` the job ends after the answer; with ``reason``, too, the other
    node is to report, and to end it. ``brought``: the ranks of a node that may not live to be asked, in a hurry."""

    reason: str = ""
    code: int | None = None
    waiting: Call | None = None
    group: tuple[int, ...] = ()
    brought: tuple[RankState, ...] = ()
