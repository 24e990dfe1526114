"""Shared windows, and every dispatcher against the sum written out token by token."""

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import torch
from all_dispatchers import all_dispatchers
from hypothesis import given, settings
from hypothesis import strategies as st

from xpar.comm import AgreedError, ProcessGrid, World
from xpar.comm.communicator import Tag
from xpar.comm.dispatch.choose import choose_dispatcher
from xpar.comm.placement import Placement
from xpar.comm.shared_window import SharedWindow, get_window
from xpar.kernels.contracts import ExpertInput, Routing

if TYPE_CHECKING:
    from mpi4py.MPI import Intracomm

pytestmark = pytest.mark.mpi
HIDDEN = 5


@pytest.fixture(scope="module")
def world(comm: "Intracomm") -> World:
    return World.attach(comm)


@pytest.fixture(scope="module")
def grid(world: World) -> ProcessGrid:
    return ProcessGrid.create(world)


@pytest.mark.mpi(max_nodes=1)
def test_a_window_shows_what_others_wrote_and_grows(world: World) -> None:
    window = SharedWindow(world.comm)
    for rows in (1, 3000, 100):
        window.reserve(rows * world.size * 8)
        mine = window.view(world.rank * rows * 8, (rows, 1), torch.int64)
        mine.fill_(rows + world.rank)
        window.fence()
        everyone = window.view(0, (rows * world.size, 1), torch.int64)
        assert everyone[:, 0].tolist() == [rows + r for r in range(world.size) for _ in range(rows)]
        window.fence()
    window.close()


@pytest.mark.mpi(min_size=2, max_nodes=1)
def test_a_window_too_large_for_the_node_is_one_error(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    window = SharedWindow(world.comm)
    if world.rank == world.size - 1:  # found on one rank, raised on all
        monkeypatch.setattr("xpar.comm.shared_window.free_bytes", lambda: 1000)
    with pytest.raises(
        AgreedError, match=r"0 MB left; enlarge it .* choose the dispatcher alltoall"
    ) as caught:
        window.reserve(1 << 20)
    assert len(set(world.comm.all_gather_object(str(caught.value)))) == 1
    monkeypatch.undo()
    window.reserve(1 << 20)
    window.close()


@pytest.mark.mpi(max_nodes=1)
def test_one_window_serves_all_layers_of_a_group(grid: ProcessGrid) -> None:
    placement = Placement.blocks(3, grid.shape.ep)
    first, second = (choose_dispatcher(grid, placement, "shared-memory").dispatcher for _ in range(2))
    assert grid.moe.size == 1 or first.window is second.window is get_window(grid.moe)  # type: ignore[attr-defined]


@pytest.mark.mpi(min_size=2, max_nodes=1)
def test_windows_are_for_one_node_with_room(grid: ProcessGrid) -> None:
    placement = Placement.blocks(8, grid.shape.ep)
    assert choose_dispatcher(grid, placement).dispatcher.name == "shared-memory"
    apart = replace(grid, world=replace(grid.world, node_of=tuple(range(grid.world.size))))
    choice = choose_dispatcher(apart, placement)
    assert choice.dispatcher.name == "allgather"
    assert f"lie on {grid.world.size} nodes and share no memory" in choice.explain()
    with pytest.raises(
        ValueError, match=r"share no memory; choose auto or one of hierarchical, allgather, alltoall"
    ):
        choose_dispatcher(apart, placement, "shared-memory")
    small = replace(grid, world=replace(grid.world, window_room=(64 << 20,) * grid.world.size))
    choice = choose_dispatcher(small, placement)
    assert choice.dispatcher.name == "allgather"
    assert "67 MB of shared memory are left on the node" in choice.explain()
    assert choose_dispatcher(small, placement, "shared-memory").dispatcher.name == "shared-memory"


def scale(hidden_states: torch.Tensor, expert: int) -> torch.Tensor:
    """A stand-in for an expert: tells experts and tokens apart and is exact in fp32."""
    return hidden_states * (expert + 1)


def computed(arrived: ExpertInput, experts: range, exact: bool) -> torch.Tensor:
    """What this rank's experts make of ``arrived``, entry by entry and slot by slot."""
    outputs = []
    for m, ids in enumerate(arrived.topk_ids.tolist()):
        x = arrived.hidden_states[m if arrived.rows is None else int(arrived.rows[m])]
        slots = [(j, scale(x, experts[e])) for j, e in enumerate(ids) if e >= 0]
        if exact:
            outputs += [y for _, y in slots]
        else:
            outputs.append(sum((arrived.topk_weights[m, j] * y for j, y in slots), torch.zeros_like(x)))
    return torch.stack(outputs) if outputs else torch.empty(0, HIDDEN)


def routing_of(tokens: int, k: int, num_experts: int, generator: torch.Generator) -> Routing:
    """Draw k different experts per token and drop some slots.

    The weights are powers of two, so that sums are exact.
    """
    order = torch.rand(tokens, num_experts, generator=generator).argsort(1)[:, :k].to(torch.int32)
    ids = order.masked_fill(torch.rand(tokens, k, generator=generator) < 0.2, -1)
    return Routing(ids, 2.0 ** -torch.randint(0, 4, (tokens, k), generator=generator))


@pytest.mark.parametrize("dispatcher", [*all_dispatchers(), "hierarchical"])
@settings(max_examples=40)
@given(data=st.data())
def test_plan_dispatch_combine_equals_the_reference(
    grid: ProcessGrid, dispatcher: str, data: st.DataObject
) -> None:
    """Ranks and experts are uneven, some ranks have no tokens or no experts.

    Some slots are dropped, and sizes change.
    """
    size, rank = grid.moe.size, grid.moe.rank
    num_experts = data.draw(st.integers(1, 9), label="experts")
    k = data.draw(st.integers(1, num_experts), label="top_k")
    counts = data.draw(st.lists(st.integers(0, 9), min_size=size, max_size=size), label="tokens")
    exact = data.draw(st.booleans(), label="exact")
    seed = data.draw(st.integers(0, 9999), label="seed")
    generator = torch.Generator().manual_seed(seed * size + rank)
    routing = routing_of(counts[rank], k, num_experts, generator)
    x = torch.randint(-8, 9, (counts[rank], HIDDEN), generator=generator).float()
    placement = Placement.blocks(num_experts, grid.shape.ep)
    mover = choose_dispatcher(grid, placement, dispatcher).dispatcher

    plan = mover.plan(routing, tag=Tag("layer", 0, 1), hidden_size=HIDDEN, dtype=x.dtype, exact=exact)
    arrived = mover.dispatch(x, plan).wait()
    made = computed(arrived, placement.experts_of(rank), exact)
    place = mover.output(plan, made.shape[0], x)
    if place is not None and data.draw(st.booleans(), label="in place"):
        made = place.copy_(made)
    got = mover.combine(made, plan).wait().tensor

    ids, weights = routing.topk_ids.tolist(), routing.topk_weights
    want = torch.zeros_like(x)
    for t, row in enumerate(ids):
        for j, e in enumerate(row):
            if e >= 0:
                want[t] += weights[t, j] * scale(x[t], e)
    assert torch.equal(got, want)
    place_of = [grid.world.node_of[r] if dispatcher == "hierarchical" else r for r in grid.moe.world_ranks]
    destinations = [{place_of[placement.owner[e]] for e in row if e >= 0} for row in ids]
    moved = sum(map(len, destinations))
    if dispatcher != "allgather":  # which sends every token everywhere
        assert plan.traffic.rows == moved
        assert plan.traffic.remote_rows == sum(len(d - {place_of[rank]}) for d in destinations)
        assert sum(plan.traffic.sent) == moved and plan.traffic.sent[rank] == moved - plan.traffic.remote_rows
    back = sum(e >= 0 for row in ids for e in row) if exact else moved
    assert plan.traffic.combined_rows == back
