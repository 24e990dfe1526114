"""The state of a tensor across a group, and functions that complete any state.

The late all-reduce (add routed and shared partial sums, reduce once) and the early all-reduce (the combine
already reduced the routed part, so the shared part is reduced alone) are consequences of the types, not
modes.
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from xpar.comm.communicator import Communicator
from xpar.comm.partition import split_range, split_sizes


@dataclass(frozen=True)
class Full:
    """The state of a tensor that has its final values on every rank."""


@dataclass(frozen=True)
class Partial:
    """The state of a tensor of which each rank of ``group`` holds an addend."""

    group: Communicator


@dataclass(frozen=True)
class Sharded:
    """The state of final values of which rank r holds ``counts[r]`` consecutive tokens."""

    group: Communicator
    counts: tuple[int, ...]


State = Full | Partial | Sharded


@dataclass(frozen=True)
class Distributed:
    """A tensor [T, H] and its state across a group."""

    tensor: Tensor
    state: State


@dataclass(frozen=True)
class Transform:
    """A ``function`` of single tokens' outputs, [T, H] to [T, H'], each row by itself.

    ``reduce_commutes``: whether f(a + b) == f(a) + f(b), as for a linear map.
    """

    function: Callable[[Tensor], Tensor]
    reduce_commutes: bool = False


def sum_outputs(
    routed: Distributed,
    shared: Distributed | None = None,
    *,
    transform: Transform | None = None,
    deferred: bool = False,
) -> Distributed:
    """Add routed and shared output with as few collectives as their states allow.

    Args:
        routed: The routed experts' output [T, H].
        shared: The shared experts' output [T, H], if the layer has any.
        transform: Applied to the routed output before the sum.
        deferred: Leave out the last collective, for a caller that fuses it with its own. The state of the
            result says what is still missing, so that it cannot be reduced twice.

    Returns:
        The sum; its state is ``Full`` unless ``deferred``.
    """
    if transform is not None:
        if isinstance(routed.state, Partial) and not transform.reduce_commutes:
            routed = to_full(routed)
        routed = Distributed(transform.function(routed.tensor), routed.state)
    result = routed if shared is None else add(routed, shared)
    return result if deferred else to_full(result)


def to_full(x: Distributed) -> Distributed:
    """Bring ``x`` into state ``Full`` by nothing, an all-reduce or an all-gather; collective."""
    if isinstance(x.state, Partial):
        return Distributed(x.state.group.all_reduce(x.tensor), Full())
    if isinstance(x.state, Sharded):
        return Distributed(x.state.group.all_gather_v(x.tensor, x.state.counts), Full())
    return x


def add(a: Distributed, b: Distributed) -> Distributed:
    """Add two tensors in any states, losing and repeating no addend; collective."""
    if same_state(a.state, b.state):
        return Distributed(a.tensor + b.tensor, a.state)
    for sharded, partial in ((a, b), (b, a)):
        if isinstance(sharded.state, Sharded) and same_state(partial.state, Partial(sharded.state.group)):
            own = sharded.state.group.reduce_scatter_v(partial.tensor, sharded.state.counts)
            return Distributed(sharded.tensor + own, sharded.state)
    return Distributed(to_full(a).tensor + to_full(b).tensor, Full())


def same_state(a: State, b: State) -> bool:
    """Return whether two states mean the same; groups of equal ranks in equal order are one group."""
    if isinstance(a, Full) or isinstance(b, Full):
        return a == b
    counts = [x.counts if isinstance(x, Sharded) else None for x in (a, b)]
    return counts[0] == counts[1] and a.group.world_ranks == b.group.world_ranks


def split_tokens(x: Tensor, group: Communicator) -> Distributed:
    """Return this rank's part of tokens ``x`` [T, ...] that all ranks of ``group`` hold; no rows move.

    A model does so before a sequence-parallel layer; :func:`to_full` gathers the parts again.
    """
    counts = tuple(split_sizes(x.shape[0], group.size))
    return Distributed(x[split_range(x.shape[0], group.size, group.rank)], Sharded(group, counts))
