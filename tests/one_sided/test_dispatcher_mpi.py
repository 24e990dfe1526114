"""The one-sided dispatcher against the all-gather dispatcher, which every rank's tokens pass through as they
are."""

import pytest
import torch
from exact_experts import answer, experts_of, routing_of, slots_of
from hypothesis import given, settings
from hypothesis import strategies as st

from xpar.comm.communicator import Communicator, Tag
from xpar.comm.device.peer_window import PeerWindow
from xpar.comm.dispatch.allgather import AllGatherDispatcher
from xpar.comm.dispatch.base import Dispatcher, DispatchPlan
from xpar.comm.dispatch.one_sided import OneSidedDispatcher
from xpar.comm.placement import Placement
from xpar.kernels.contracts import Routing, Slots

pytestmark = pytest.mark.mpi(deadline=60)


def through(
    mover: Dispatcher, x: torch.Tensor, routing: Routing, exact: bool, way: str
) -> tuple[torch.Tensor, DispatchPlan]:
    etp = mover.placement.etp
    plan = mover.plan(routing, tag=Tag("layer", 0, 1), hidden_size=x.shape[1], dtype=x.dtype, exact=exact)
    arrived = mover.dispatch(x, plan).wait()
    held = mover.placement.experts_of(mover.group.rank // etp)
    if way == "slots":
        assert isinstance(mover, OneSidedDispatcher)
        return mover.combine_slots(Slots(slots_of(arrived, held) / etp), plan).wait().tensor, plan
    made = experts_of(arrived, held, exact) / etp if held else x.new_empty(0, x.shape[1])
    return mover.combine(made, plan).wait().tensor, plan


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_equals_allgather(group: Communicator, shared: PeerWindow, data: st.DataObject) -> None:
    """Uneven and empty ranks, sliced experts, ranks without experts, dropped slots, exact mode, growing
    windows."""
    size, rank = group.size, group.rank
    etp = data.draw(st.sampled_from([n for n in (1, 2) if size % n == 0]), label="etp")
    num_experts = data.draw(st.integers(1, 9), label="experts")
    k = data.draw(st.integers(1, num_experts), label="top_k")
    counts = data.draw(st.lists(st.integers(0, 9), min_size=size, max_size=size), label="tokens")
    width = data.draw(st.sampled_from([5, 8, 40]), label="width")
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16]), label="dtype")
    exact = etp == 1 and data.draw(st.booleans(), label="exact")
    way = data.draw(st.sampled_from(["rows", "slots"]), label="way")
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 9999), label="seed") * size + rank)
    routing = routing_of(counts[rank], k, num_experts, generator)
    x = torch.randint(-8, 9, (counts[rank], width), generator=generator).to(dtype)
    placement = Placement.blocks(num_experts, size // etp, etp)
    got, plan = through(OneSidedDispatcher(group, placement, shared), x, routing, exact, way)
    want, other = through(AllGatherDispatcher(group, placement, whole=not exact), x, routing, exact, "rows")
    if exact:  # slots are exact, and host kernels round halfway cases of bfloat16 to odd
        want = answer(x, routing)
    fine = got.dtype == want.dtype and torch.equal(got, want)
    fine = fine and (torch.equal(got, answer(x, routing)) or dtype == torch.bfloat16)
    fine = fine and plan.traffic.rows <= other.traffic.rows and plan.traffic.sent[rank] <= counts[rank]
    assert all(group.all_gather_object(fine)), (got, want)  # alike on all ranks, which stay in step


@pytest.fixture(scope="module")
def shared(group: Communicator) -> PeerWindow:
    """One for the whole module: steps of all sizes follow each other on it, as layers do."""
    from xpar.comm.watchdog.deadlines import Deadlines

    return PeerWindow(group, torch.device("cpu"), Deadlines(connect=30, finish=30))


def test_copies_of_experts(group: Communicator, shared: PeerWindow, fresh_seed: int) -> None:
    """Ids past the experts' name a rank's copy; the copy computes as the expert after the rank's block."""
    size, rank = group.size, group.rank
    placement = Placement.blocks(2 * size + 1, size, copies=1)
    generator = torch.Generator().manual_seed(fresh_seed + rank)
    routing = routing_of(5, 2, 2 * size + 1, generator)
    ids = torch.cat([routing.topk_ids, torch.full((5, 1), 2 * size + 1 + rank, dtype=torch.int32)], 1)
    routing = Routing(ids, torch.cat([routing.topk_weights, torch.ones(5, 1)], 1))
    x = torch.randint(-8, 9, (5, 8), generator=generator).float()
    outputs = [
        through(mover, x, routing, False, "rows")[0]
        for mover in (
            OneSidedDispatcher(group, placement, shared),
            AllGatherDispatcher(group, placement, whole=True),
        )
    ]
    assert torch.equal(*outputs)


def test_rows_at_odd_addresses(group: Communicator, shared: PeerWindow) -> None:
    """A view may begin in the middle of a word, and be strided."""
    mover = OneSidedDispatcher(group, Placement.blocks(2, group.size), shared)
    memory = torch.arange(2 * 8 + 1).to(torch.bfloat16)
    routing = Routing(torch.tensor([[0, 1], [1, 0]], dtype=torch.int32).t(), torch.ones(2, 2).t())
    for x in (memory[1:].view(2, 8), memory[1:].view(2, 8)[:, ::2], memory[1:].view(8, 2).t()):
        got, _ = through(mover, x, routing, False, "rows")
        assert torch.equal(got, answer(x, routing))


def test_opaque_rows(group: Communicator, shared: PeerWindow, fresh_seed: int) -> None:
    """Quantised values with their scales beside them arrive as the bytes that they were.

    Results keep their own dtype.
    """
    size, rank = group.size, group.rank
    rows = [
        torch.randint(0, 256, (3 + r, 36), generator=torch.Generator().manual_seed(fresh_seed + r))
        for r in range(size)
    ]
    placement = Placement.blocks(size, size)
    mover = OneSidedDispatcher(group, placement, shared)
    everywhere = torch.arange(size, dtype=torch.int32).expand(3 + rank, size)
    routing = Routing(everywhere, torch.ones(3 + rank, size))
    plan = mover.plan(routing, tag=Tag("layer", 0, 1), hidden_size=16, dtype=torch.bfloat16)
    arrived = mover.dispatch(rows[rank].to(torch.uint8), plan).wait()
    assert arrived.hidden_states.dtype == torch.uint8
    assert torch.equal(arrived.hidden_states, torch.cat(rows).to(torch.uint8))
    made = arrived.hidden_states[:, :16].to(torch.bfloat16)
    got = mover.combine(made, plan).wait().tensor
    assert torch.equal(got, (size * rows[rank][:, :16]).to(torch.bfloat16))


def test_a_routing_error_is_one_error_everywhere(group: Communicator, shared: PeerWindow) -> None:
    mover = OneSidedDispatcher(group, Placement.blocks(4, group.size), shared)
    fine = Routing(torch.zeros(1, 1, dtype=torch.int32), torch.ones(1, 1))
    with pytest.raises(RuntimeError, match="planted"):
        mover.plan(
            ValueError("planted") if group.rank == 0 else fine,
            tag=Tag("layer"),
            hidden_size=8,
            dtype=torch.float32,
        )
