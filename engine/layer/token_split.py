"""Splits tokens that several ranks hold as copies between them before dispatch.

The ranks of a tensor-parallel group get the same T tokens. Either every rank dispatches all of them
(:class:`KeepAllTokens`) or each rank dispatches a slice of them (:class:`SplitOverTensorParallel`).
"""

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
    """A way to split T given tokens between the ranks that hold them.

    Attributes:
        job_group: The ranks that together dispatch each token of the job once.
    """

    job_group: Communicator

    def local_slice(self, tokens: int) -> slice:
        """Return which of ``tokens`` given tokens this rank routes and dispatches."""

    def as_sharded(self, routed: Distributed, tokens: int) -> Distributed:
        """Name the state of the local slice's output among the ranks that hold the same tokens."""

    def gather_routing(self, local: Routing, tokens: int) -> Routing:
        """All-gather the routing of the local slices into that of all ``tokens`` tokens; collective."""


class KeepAllTokens:
    """Every rank dispatches all its tokens: no other has them, or the dispatcher wants copies."""

    def __init__(self, job_group: Communicator) -> None:
        self.job_group = job_group

    def local_slice(self, tokens: int) -> slice:
        return slice(0, tokens)

    def as_sharded(self, routed: Distributed, tokens: int) -> Distributed:
        return routed

    def gather_routing(self, local: Routing, tokens: int) -> Routing:
        return local


class SplitOverTensorParallel:
    """The ranks of ``group`` hold the same tokens, and each rank dispatches its slice of them."""

    def __init__(self, group: Communicator, job_group: Communicator) -> None:
        self.group, self.job_group = group, job_group

    def local_slice(self, tokens: int) -> slice:
        return split_range(tokens, self.group.size, self.group.rank)

    def as_sharded(self, routed: Distributed, tokens: int) -> Distributed:
        return Distributed(routed.tensor, self._sharded(tokens)) if routed.state == Full() else routed

    def gather_routing(self, local: Routing, tokens: int) -> Routing:
        def gather(x: Tensor) -> Tensor:
            return to_full(Distributed(x, self._sharded(tokens))).tensor

        identity = None if local.identity_weights is None else gather(local.identity_weights)
        return replace(
            local,
            topk_ids=gather(local.topk_ids),
            topk_weights=gather(local.topk_weights),
            identity_weights=identity,
        )

    def _sharded(self, tokens: int) -> Sharded:
        return Sharded(self.group, tuple(split_sizes(tokens, self.group.size)))


def choose_token_split(grid: ProcessGrid, dispatcher: Dispatcher, sequence_parallel: bool) -> TokenSplit:
    """Choose the split; ``sequence_parallel``: the ranks of a tp group hold different tokens."""
    if sequence_parallel or grid.tp.size == 1:
        return KeepAllTokens(grid.world.comm)
    if dispatcher.capabilities.replicated_tokens:
        return KeepAllTokens(grid.dp)
    return SplitOverTensorParallel(grid.tp, grid.world.comm)
