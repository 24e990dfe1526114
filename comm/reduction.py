"""What a tensor *is* across a group, and the one function that knows how to finish it.

Late all-reduce (add routed and shared partial sums, reduce once) and early all-reduce (the combine already
reduced the routed part, so the shared part is reduced alone) are consequences of the types, not modes.
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from xpar.comm.communicator import Communicator
from xpar.comm.partition import split_range, split_sizes


@dataclass(frozen=True)
class Full:
    """Every rank holds the final values."""


@dataclass(frozen=True)
class Partial:
    """The ranks of ``group`` hold addends of the final values."""

    group: Communicator


@dataclass(frozen=True)
class Sharded:
    """The ranks of ``group`` hold the final values of consecutive tokens, ``counts[r]`` on rank r."""

    group: Communicator
    counts: tuple[int, ...]


State = Full | Partial | Sharded


@dataclass(frozen=True)
class Distributed:
    """A tensor [T, H] and what it is across its group."""

    tensor: Tensor
    state: State


@dataclass(frozen=True)
class Transform:
    """A function of single tokens' outputs. ``reduce_commutes``: f(a + b) == f(a) + f(b), as of a linear map."""

    function: Callable[[Tensor], Tensor]
    reduce_commutes: bool = False


def sum_outputs(
    routed: Distributed,
    shared: Distributed | None = None,
    *,
    transform: Transform | None = None,
    deferred: bool = False,
) -> Distributed:
    """Transform the routed output, add the shared one, and complete the sum with as few collectives as the types allow.

    ``deferred``: return without the last collective, for a caller that fuses it with its own; the result's state
    says what is still missing, so it cannot be reduced twice. Otherwise the result is ``Full``.
    """
    if transform is not None:
        if isinstance(routed.state, Partial) and not transform.reduce_commutes:
            routed = to_full(routed)
        routed = Distributed(transform.function(routed.tensor), routed.state)
    result = routed if shared is None else add(routed, shared)
    return result if deferred else to_full(result)


def to_full(x: Distributed) -> Distributed:
    """The ``Full`` form of ``x``: nothing, one all-reduce or one all-gather."""
    if isinstance(x.state, Partial):
        return Distributed(x.state.group.all_reduce(x.tensor), Full())
    if isinstance(x.state, Sharded):
        return Distributed(x.state.group.all_gather_v(x.tensor, x.state.counts), Full())
    return x


def add(a: Distributed, b: Distributed) -> Distributed:
    """The sum, in a state that neither loses nor repeats an addend."""
    if same_state(a.state, b.state):
        return Distributed(a.tensor + b.tensor, a.state)
    for sharded, partial in ((a, b), (b, a)):
        if isinstance(sharded.state, Sharded) and same_state(partial.state, Partial(sharded.state.group)):
            mine = sharded.state.group.reduce_scatter_v(partial.tensor, sharded.state.counts)
            return Distributed(sharded.tensor + mine, sharded.state)
    return Distributed(to_full(a).tensor + to_full(b).tensor, Full())


def same_state(a: State, b: State) -> bool:
    """Whether two states say the same: two groups of the same ranks in the same order are one for this."""
    if isinstance(a, Full) or isinstance(b, Full):
        return a == b
    counts = [x.counts if isinstance(x, Sharded) else None for x in (a, b)]
    return counts[0] == counts[1] and a.group.world_ranks == b.group.world_ranks


def split_tokens(x: Tensor, group: Communicator) -> Distributed:
    """This rank's share of tokens ``x`` [T, ...] that every rank of ``group`` holds; :func:`to_full` gathers them again.

    What a model does before a sequence-parallel layer. No rows move.
    """
    counts = tuple(split_sizes(x.shape[0], group.size))
    return Distributed(x[split_range(x.shape[0], group.size, group.rank)], Sharded(group, counts))
