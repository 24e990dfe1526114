"""The truth table of the two all-reduce points: the collectives that run, and the sum."""

from typing import TYPE_CHECKING

import pytest
import torch
from counting_communicator import Counting
from torch import Tensor

from xpar.comm import World
from xpar.comm.partition import split_range, split_sizes
from xpar.comm.reduction import (
    Distributed,
    Full,
    Partial,
    Sharded,
    State,
    Transform,
    add,
    split_tokens,
    sum_outputs,
    to_full,
)

if TYPE_CHECKING:
    from mpi4py.MPI import Intracomm

pytestmark = pytest.mark.mpi
TOKENS = 7


@pytest.fixture
def group(comm: "Intracomm") -> Counting:
    return Counting(World.attach(comm).comm)


def spread(value: Tensor, kind: str, group: Counting) -> Distributed:
    """``value`` as this rank would hold it."""
    state: State
    if kind == "partial":
        addends = torch.stack([torch.full_like(value, float(r)) for r in range(group.size)])
        mine = addends[group.rank] + (value - addends.sum(0) if group.rank == 0 else 0)
        state = Partial(group)
        return Distributed(mine, state)
    if kind == "sharded":
        state = Sharded(group, tuple(split_sizes(TOKENS, group.size)))
        return Distributed(value[split_range(TOKENS, group.size, group.rank)], state)
    return Distributed(value, Full())


LINEAR = Transform(lambda x: 2 * x, reduce_commutes=True)
NORM = Transform(lambda x: x / (1 + x.abs()))
CASES = [
    # kernel output reduced?, shared, transform -> collectives
    ("partial", None, None, {"all_reduce": 1}),
    ("partial", "partial", None, {"all_reduce": 1}),
    ("partial", "partial", LINEAR, {"all_reduce": 1}),
    ("partial", None, NORM, {"all_reduce": 1}),
    ("partial", "partial", NORM, {"all_reduce": 2}),
    ("partial", "full", None, {"all_reduce": 1}),
    ("full", None, None, {}),
    ("full", None, NORM, {}),
    ("full", "full", None, {}),
    ("full", "partial", None, {"all_reduce": 1}),
    ("full", "partial", NORM, {"all_reduce": 1}),
    ("sharded", None, None, {"all_gather": 1}),
    ("sharded", "sharded", NORM, {"all_gather": 1}),
    ("sharded", "partial", None, {"reduce_scatter": 1, "all_gather": 1}),
]


def name(case: tuple[str, str | None, Transform | None, dict[str, int]]) -> str:
    transform = {id(None): "none", id(LINEAR): "commutes", id(NORM): "norm"}[id(case[2])]
    return f"{case[0]}-shared_{case[1]}-{transform}"


@pytest.mark.parametrize("case", CASES, ids=name)
def test_full_result_and_its_collectives(group: Counting, fresh_seed: int, case: tuple) -> None:  # type: ignore[type-arg]
    kind, shared_kind, transform, calls = case
    generator = torch.Generator().manual_seed(fresh_seed)
    routed, shared = torch.randn(2, TOKENS, 3, generator=generator)
    expected = (transform.function(routed) if transform else routed) + (shared if shared_kind else 0)
    result = sum_outputs(
        spread(routed, kind, group),
        spread(shared, shared_kind, group) if shared_kind else None,
        transform=transform,
    )
    assert result.state == Full()
    assert (result.tensor - expected).abs().max() < 1e-4
    assert group.calls == calls


@pytest.mark.parametrize("shared_kind", [None, "partial"])
def test_deferred_partial_costs_nothing_and_says_what_is_missing(
    group: Counting, shared_kind: str | None
) -> None:
    value = torch.ones(TOKENS, 3)
    shared = spread(value, shared_kind, group) if shared_kind else None
    result = sum_outputs(spread(value, "partial", group), shared, deferred=True)
    assert isinstance(result.state, Partial)
    assert not group.calls
    assert (sum_outputs(result).tensor - (2 if shared_kind else 1)).abs().max() < 1e-5


def test_deferred_after_a_nonlinear_transform_is_full_and_not_reduced_twice(group: Counting) -> None:
    result = sum_outputs(spread(torch.ones(TOKENS, 3), "partial", group), transform=NORM, deferred=True)
    assert result.state == Full()
    assert (sum_outputs(result).tensor - 0.5).abs().max() < 1e-5
    assert group.calls == {"all_reduce": 1}


def test_sequence_parallel_needs_no_collective_here(group: Counting) -> None:
    value = torch.ones(TOKENS, 3)
    result = sum_outputs(spread(value, "sharded", group), spread(value, "sharded", group), deferred=True)
    assert isinstance(result.state, Sharded)
    assert not group.calls


@pytest.mark.parametrize("kind", ["partial", "sharded"])
def test_two_groups_of_the_same_ranks_are_one(group: Counting, kind: str) -> None:
    value = torch.ones(TOKENS, 3)
    twin = Counting(group.inner.split(0, group.rank, "twin"))
    result = add(spread(value, kind, group), spread(value, "partial", twin))
    assert type(result.state) is (Partial if kind == "partial" else Sharded)
    assert (to_full(result).tensor - 2).abs().max() < 1e-5
    assert (group.calls + twin.calls).total() == (1 if kind == "partial" else 2)


@pytest.mark.parametrize("tokens", [0, 1, TOKENS])
def test_tokens_are_split_and_gathered_again(group: Counting, tokens: int, fresh_seed: int) -> None:
    x = torch.randn(tokens, 3, generator=torch.Generator().manual_seed(fresh_seed))
    mine = split_tokens(x, group)
    assert not group.calls
    assert isinstance(mine.state, Sharded) and mine.tensor.shape[0] == mine.state.counts[group.rank]
    assert torch.equal(to_full(mine).tensor, x)
