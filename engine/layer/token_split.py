"""Which of the tokens that a rank is given it dispatches itself, and what that makes of the experts' output."""

from dataclasses import replace
from typing import Protocol

from torch import Tensor

from xpar.comm.communicator import Communicator
from xpar.comm.dispatch.base import Dispatcher
from xpar.comm.grid import ProcessGrid
from xpar.comm.partition import split_range, split_sizes
from xpar.comm.reduction import Distributed, Full, Sharded, to_full
from xpar.kernels.contracts import Routing


class TokenSplit(Protocol):
    """One way to dispatch T given tokens. ``everyone``: ranks that together dispatch each token of the job once."""

    everyone: Communicator

    def mine(self, tokens: int) -> slice:
        """Those that this rank routes and dispatches."""

    def claim(self, routed: Distributed, tokens: int) -> Distributed:
        """What the combined output of ``mine`` is among the ranks that were given the same tokens."""

    def whole_routing(self, own: Routing, tokens: int) -> Routing:
        """The routing of all T, on every rank that was given them, of that of ``mine``."""


class KeepAllTokens:
    """All of them: no other rank is given the same tokens, or the dispatcher wants its ranks to have copies."""

    def __init__(self, everyone: Communicator) -> None:
        self.everyone = everyone

    def mine(self, tokens: int) -> slice:
        return slice(0, tokens)

    def claim(self, routed: Distributed, tokens: int) -> Distributed:
        return routed

    def whole_routing(self, own: Routing, tokens: int) -> Routing:
        return own


class SplitOverTensorParallel:
    """The ranks of ``group`` are given the same tokens, and each dispatches its share of them."""

    def __init__(self, group: Communicator, everyone: Communicator) -> None:
        self.group, self.everyone = group, everyone

    def mine(self, tokens: int) -> slice:
        return split_range(tokens, self.group.size, self.group.rank)

    def claim(self, routed: Distributed, tokens: int) -> Distributed:
        return Distributed(routed.tensor, self._sharded(tokens)) if routed.state == Full() else routed

    def whole_routing(self, own: Routing, tokens: int) -> Routing:
        def whole(x: Tensor) -> Tensor:
            return to_full(Distributed(x, self._sharded(tokens))).tensor

        identity = None if own.identity_weights is None else whole(own.identity_weights)
        return replace(
            own,
            topk_ids=whole(own.topk_ids),
            topk_weights=whole(own.topk_weights),
            identity_weights=identity,
        )

    def _sharded(self, tokens: int) -> Sharded:
        return Sharded(self.group, tuple(split_sizes(tokens, self.group.size)))


def choose_token_split(grid: ProcessGrid, dispatcher: Dispatcher, sequence_parallel: bool) -> TokenSplit:
    """``sequence_parallel``: the ranks of a tp group are given different tokens."""
    if sequence_parallel or grid.tp.size == 1:
        return KeepAllTokens(grid.world.comm)
    if dispatcher.capabilities.replicated_tokens:
        return KeepAllTokens(grid.dp)
    return SplitOverTensorParallel(grid.tp, grid.world.comm)
