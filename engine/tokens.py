"""Which of the tokens that a rank is given it dispatches itself, and what that makes of the experts' output."""

from typing import Protocol

from torch import Tensor

from xpar.comm.communicator import Communicator
from xpar.comm.dispatch.base import Dispatcher
from xpar.comm.grid import ProcessGrid
from xpar.comm.reduction import Distributed, Full, Sharded, complete
from xpar.comm.shares import share, shares


class Tokens(Protocol):
    """One way to dispatch T given tokens."""

    def mine(self, tokens: int) -> slice:
        """Those that this rank routes and dispatches."""

    def claim(self, routed: Distributed, tokens: int) -> Distributed:
        """What the combined output of ``mine`` is among the ranks that were given the same tokens."""

    def whole(self, own: Tensor, tokens: int) -> Tensor:
        """[T, ...], on every rank, of the rows [t, ...] that belong to ``mine``."""


class AllTokens:
    """All of them: no other rank is given the same tokens, or the dispatcher wants its ranks to have copies."""

    def mine(self, tokens: int) -> slice:
        return slice(0, tokens)

    def claim(self, routed: Distributed, tokens: int) -> Distributed:
        return routed

    def whole(self, own: Tensor, tokens: int) -> Tensor:
        return own


class SharedOut:
    """The ranks of ``group`` are given the same tokens, and each dispatches its share of them."""

    def __init__(self, group: Communicator) -> None:
        self.group = group

    def mine(self, tokens: int) -> slice:
        return share(tokens, self.group.size, self.group.rank)

    def claim(self, routed: Distributed, tokens: int) -> Distributed:
        return Distributed(routed.tensor, self._sharded(tokens)) if routed.state == Full() else routed

    def whole(self, own: Tensor, tokens: int) -> Tensor:
        return complete(Distributed(own, self._sharded(tokens))).tensor

    def _sharded(self, tokens: int) -> Sharded:
        return Sharded(self.group, tuple(shares(tokens, self.group.size)))


def tokens_of(grid: ProcessGrid, dispatcher: Dispatcher, sequence_parallel: bool) -> Tokens:
    """``sequence_parallel``: the ranks of a tp group are given different tokens."""
    if sequence_parallel or grid.tp.size == 1 or dispatcher.name == "replicated":
        return AllTokens()
    return SharedOut(grid.tp)
