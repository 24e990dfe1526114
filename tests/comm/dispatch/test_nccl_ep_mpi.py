"""The dispatcher over NCCL's EP extension against the all-gather dispatcher; a stand-in is the extension."""

import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import stand_in_nccl_ep
import torch
from exact_experts import answer, experts_of, routing_of, slots_of
from fake_nccl import FakeNccl
from hypothesis import given, settings
from hypothesis import strategies as st

from xpar.comm import AgreedError, ProcessGrid, World
from xpar.comm.communicator import Communicator, Tag
from xpar.comm.device import nccl_ep_exchange
from xpar.comm.device.nccl_ep_exchange import MOST_TOKENS, NcclEp, RowShape
from xpar.comm.device.nccl_ep_requirements import NcclEpFacts
from xpar.comm.device.watch import Watch
from xpar.comm.dispatch.allgather import AllGatherDispatcher
from xpar.comm.dispatch.base import Dispatcher, DispatchPlan
from xpar.comm.dispatch.nccl_ep import NcclEpDispatcher, NcclEpPlan, OtherWay
from xpar.comm.handshake import CollectiveError
from xpar.comm.placement import Placement
from xpar.comm.step_agreement import AgreedStep
from xpar.comm.watchdog.deadlines import Deadlines
from xpar.engine.layer.build import build_layer
from xpar.engine.layer.options import LayerOptions
from xpar.engine.layer.runner import MoERunner
from xpar.engine.synthetic.layer import SyntheticLayer
from xpar.engine.synthetic.shapes import shape_of
from xpar.kernels.contracts import Routing, Slots

if TYPE_CHECKING:
    from mpi4py.MPI import Intracomm

pytestmark = pytest.mark.mpi(deadline=90)
HOST = torch.device("cpu")
SOON = Deadlines(connect=20, start=20, finish=20, abort=1)
WIDTH = {torch.float32: 256, torch.bfloat16: 512}


@pytest.fixture(scope="module")
def host(comm: "Intracomm") -> Communicator:
    return World.attach(comm, allow_singleton=True).comm


def facts(size: int, nodes: int = 2) -> list[NcclEpFacts]:
    """Those of ranks that have all they need, evenly on nodes where their number allows it."""
    nodes = nodes if size % nodes == 0 else 1
    return [NcclEpFacts(f"node {r * nodes // size}", f"GPU-{r}", 132, "", None) for r in range(size)]


def connect(comm: "Intracomm", host: Communicator, **faults: Any) -> NcclEp:
    watch = Watch(lambda problem: pytest.fail(problem))
    return NcclEp(host, HOST, SOON, watch, facts(host.size), FakeNccl(comm, **faults))


@pytest.fixture(scope="module")
def connections(comm: "Intracomm", host: Communicator) -> Iterator[NcclEp]:
    """Of the whole module: steps of all sizes follow each other on them, as layers do."""
    with pytest.MonkeyPatch.context() as patch:
        stand_in_nccl_ep.Installed().put(patch)
        opened = connect(comm, host)
        yield opened
        opened.close()
        opened.watch.close()


def through(
    mover: Dispatcher, x: torch.Tensor, routing: Routing, exact: bool = False, way: str = "rows"
) -> tuple[torch.Tensor, DispatchPlan]:
    etp = mover.placement.etp
    plan = mover.plan(routing, tag=Tag("layer", 0, 1), hidden_size=x.shape[1], dtype=x.dtype, exact=exact)
    arrived = mover.dispatch(x, plan).wait()
    held = mover.placement.experts_of(mover.group.rank // etp)
    if way == "slots" and held and arrived.rows is None:
        assert isinstance(mover, NcclEpDispatcher)
        return mover.combine_slots(Slots(slots_of(arrived, held) / etp), plan).wait().tensor, plan
    made = experts_of(arrived, held, exact) / etp if held else x.new_empty(0, x.shape[1])
    return mover.combine(made, plan).wait().tensor, plan


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_equals_allgather(host: Communicator, connections: NcclEp, data: st.DataObject) -> None:
    """Uneven and empty ranks, uneven and sliced experts, ranks without experts, dropped slots, exact mode."""
    size, rank = host.size, host.rank
    etp = data.draw(st.sampled_from([n for n in (1, 2) if size % n == 0]), label="etp")
    num_experts = data.draw(st.integers(1, 9), label="experts")
    k = data.draw(st.integers(1, num_experts), label="top_k")
    counts = data.draw(st.lists(st.integers(0, 9), min_size=size, max_size=size), label="tokens")
    exact = etp == 1 and data.draw(st.booleans(), label="exact")
    way = data.draw(st.sampled_from(["rows", "slots"]), label="way")
    # Host kernels round halfway cases of a weighted sum in bfloat16 to odd, and this test's experts do not.
    dtypes = [torch.float32] if way == "slots" and not exact else [torch.float32, torch.bfloat16]
    dtype = data.draw(st.sampled_from(dtypes), label="dtype")
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 9999), label="seed") * size + rank)
    routing = routing_of(counts[rank], k, num_experts, generator)
    x = torch.randint(-8, 9, (counts[rank], WIDTH[dtype]), generator=generator).to(dtype)
    placement = Placement.blocks(num_experts, size // etp, etp)
    got, plan = through(NcclEpDispatcher(host, placement, connections), x, routing, exact, way)
    want, other = through(AllGatherDispatcher(host, placement, whole=not exact), x, routing, exact)
    fine = got.dtype == want.dtype and torch.equal(got, want)
    fine = fine and (torch.equal(got, answer(x, routing)) or dtype == torch.bfloat16)
    fine = fine and plan.traffic.rows <= other.traffic.rows and plan.traffic.sent[rank] <= counts[rank]
    assert all(host.all_gather_object(bool(fine))), (got, want)  # alike on all ranks, which stay in step


@pytest.mark.parametrize("exact", [False, True])
def test_the_checks_for_gpus_find_nothing(
    host: Communicator, connections: NcclEp, monkeypatch: pytest.MonkeyPatch, fresh_seed: int, exact: bool
) -> None:
    """Those that a machine with the extension runs; they find results that are off in one column."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "gpu"))
    import nccl_ep_checks

    check = partial(nccl_ep_checks.same_bits, host, connections, HOST, 512, 2 * host.size + 1, 3, exact)
    assert host.all_gather_object(check(fresh_seed, steps=5)) == [None] * host.size
    combine = stand_in_nccl_ep.Handle.combine

    def off(self: Any, inputs: Any, outputs: Any, **rest: Any) -> None:
        combine(self, inputs, outputs, **rest)
        outputs.tokens.buffer[:, 5] += 64

    monkeypatch.setattr(stand_in_nccl_ep.Handle, "combine", off)
    assert "differ" in str(check(fresh_seed, steps=1))


@pytest.mark.parametrize("exact", [False, True])
def test_a_whole_layer(host: Communicator, connections: NcclEp, fresh_seed: int, exact: bool) -> None:
    """Shared experts, a real kernel, uneven ranks: the bits of the all-gather in exact mode."""
    world = World.attach(allow_singleton=True)
    grid = ProcessGrid.create(world)
    layer = SyntheticLayer(shape_of("deepseek-v2-lite").layer(0.125), torch.float32, fresh_seed)
    runner = build_layer(layer.config, grid, torch.float32, layer.read, LayerOptions(exact=exact))
    placement, h = runner.dispatcher.placement, layer.config.hidden_size
    x = torch.randn(2 + world.rank, h, generator=torch.Generator().manual_seed(fresh_seed + world.rank))
    outputs = []
    for mover in (
        NcclEpDispatcher(grid.moe, placement, connections),
        AllGatherDispatcher(grid.moe, placement, whole=not exact),
    ):
        experts = replace(runner.experts, dispatcher=mover)
        parts = {"dtype": runner.dtype, "shared": runner.shared, "options": runner.options}
        outputs.append(MoERunner(runner.config, grid, runner.router, experts, **parts)(x))
    fine = torch.equal(*outputs) if exact else torch.allclose(*outputs, rtol=1e-5, atol=1e-6)
    assert all(host.all_gather_object(fine))
    grid.close()


@pytest.mark.mpi(min_size=2, deadline=90)
@pytest.mark.parametrize("nodes", [1, 2])
def test_ranks_ask_each_other_when_a_grid_is_made(
    comm: "Intracomm", host: Communicator, monkeypatch: pytest.MonkeyPatch, nodes: int
) -> None:
    """What one lacks refuses all; an exchange is tried between nodes alone."""
    stand_in_nccl_ep.Installed().put(monkeypatch)
    device, watch, library = torch.device("cpu"), Watch(print), FakeNccl(comm)
    own = NcclEpFacts(f"node {host.rank * nodes // host.size}", f"GPU-{host.rank}", 132, "", None)
    if host.size % nodes:
        own = replace(own, host=f"node {host.rank}")
    monkeypatch.setattr(nccl_ep_exchange, "collect_nccl_ep_facts", lambda device: own)
    monkeypatch.setattr(nccl_ep_exchange, "open_library", lambda: library)
    found = NcclEp.find(host, device, SOON, watch)
    assert found.refusal is None and found.spans_nodes == (nodes > 1)
    assert [n for n in ("init", "destroy") if (n in {c[0] for c in library.calls})] == ["init"] * (nodes > 1)
    found.close()
    own = replace(own, problem="no nvcc" if host.rank else None)
    assert NcclEp.find(host, device, SOON, watch).refusal == "rank 1: no nvcc"
    monkeypatch.setattr(stand_in_nccl_ep.Communicator, "gin_type", 0)
    own, library = replace(own, problem=None), FakeNccl(comm)
    found = NcclEp.find(host, device, SOON, watch)
    assert ("(GIN)" in str(found.refusal)) == (nodes > 1)
    found.close()
    watch.close()


@pytest.mark.mpi(min_size=3, deadline=90)
def test_ranks_are_added_in_ascending_order(host: Communicator, connections: NcclEp, fresh_seed: int) -> None:
    """Whatever the order of a token's experts: in float32 the sum of three depends on it."""
    size, rank = host.size, host.rank
    generator = torch.Generator().manual_seed(fresh_seed + rank)
    x = torch.randn(20, 256, generator=generator) * 10.0 ** torch.randint(
        -3, 4, (20, 256), generator=generator
    )
    routing = Routing(
        torch.rand(20, 2 * size, generator=generator).argsort(1).to(torch.int32)[:, :5],
        torch.rand(20, 5, generator=generator),
    )
    placement = Placement.blocks(2 * size, size)
    got, _ = through(NcclEpDispatcher(host, placement, connections), x, routing)
    want, _ = through(AllGatherDispatcher(host, placement, whole=True), x, routing)
    assert torch.equal(got, want)


def test_copies_of_experts(host: Communicator, connections: NcclEp, fresh_seed: int) -> None:
    """Ids past the experts' name a rank's copy, which computes as the expert after the rank's block."""
    size, rank = host.size, host.rank
    experts = 2 * size + 1
    placement = Placement.blocks(experts, size, copies=1)
    generator = torch.Generator().manual_seed(fresh_seed + rank)
    routing = routing_of(5, 2, experts, generator)
    ids = torch.cat([routing.topk_ids, torch.full((5, 1), experts + rank, dtype=torch.int32)], 1)
    routing = Routing(ids, torch.cat([routing.topk_weights, torch.ones(5, 1)], 1))
    x = torch.randint(-8, 9, (5, 256), generator=generator).float()
    mover = NcclEpDispatcher(host, placement, connections)
    assert mover.local_experts == len(placement.experts_of(0)) + 1
    want, _ = through(AllGatherDispatcher(host, placement, whole=True), x, routing)
    assert torch.equal(through(mover, x, routing)[0], want)


def test_rows_at_odd_addresses(host: Communicator, connections: NcclEp) -> None:
    mover = NcclEpDispatcher(host, Placement.blocks(2, host.size), connections)
    memory = torch.arange(2 * 512 + 1).remainder(50).to(torch.bfloat16)
    routing = Routing(torch.tensor([[0, 1], [1, 0]], dtype=torch.int32).t(), torch.ones(2, 2).t())
    for x in (memory[1:].view(2, 512), memory[1:].view(512, 2).t()):
        assert torch.equal(through(mover, x, routing)[0], answer(x, routing))


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("way", ["rows", "slots"])
def test_larger_steps_go_another_way(
    host: Communicator, connections: NcclEp, fresh_seed: int, exact: bool, way: str
) -> None:
    """One rank has more rows than a connection takes; the ranks have announced their tokens, or not."""
    k, placement = 3, Placement.blocks(5, host.size)
    most = MOST_TOKENS[-1] // (k if exact else 1)
    counts = [most + 1 if r == host.size - 1 else 2 for r in range(host.size)]
    generator = torch.Generator().manual_seed(fresh_seed + host.rank)
    routing = routing_of(counts[host.rank], k, 5, generator)
    x = torch.randint(-8, 9, (counts[host.rank], 256), generator=generator).float()
    mover = NcclEpDispatcher(host, placement, connections)
    for announced in (None, tuple(counts)):
        mover.agreed = AgreedStep(announced)
        got, plan = through(mover, x, routing, exact, way)
        assert isinstance(plan.dispatcher_state, OtherWay) and torch.equal(got, answer(x, routing))
        assert plan.dispatcher_state.dispatcher.agreed is mover.agreed  # or it would ask for counts again
        assert plan.traffic.rows >= int((routing.topk_ids >= 0).any(1).sum())
    one_less = x[:most], Routing(routing.topk_ids[:most], routing.topk_weights[:most])
    mover.agreed = None
    got, plan = through(mover, *one_less, exact, way)
    assert isinstance(plan.dispatcher_state, NcclEpPlan) and torch.equal(got, answer(*one_less))


def test_a_connection_is_opened_once_and_closed_in_order(comm: "Intracomm", host: Communicator) -> None:
    """It is tried when it is opened; its kernels wait longer than the thread that can report."""
    with pytest.MonkeyPatch.context() as patch:
        stand_in_nccl_ep.Installed().put(patch)
        opened, library = connect(comm, host), FakeNccl(comm)
        opened._library = library
        mover = NcclEpDispatcher(host, Placement.blocks(host.size, host.size), opened)
        routing = Routing(torch.zeros(3, 1, dtype=torch.int32), torch.ones(3, 1))
        for x in (torch.ones(3, 256), torch.ones(3, 256), torch.ones(3, 512)):
            assert torch.equal(through(mover, x, routing)[0], x)
        assert opened.try_exchange() is None
        notes = stand_in_nccl_ep.NOTES
        made = [note[1] for note in notes if note[0] == "group"]
        assert [c.max_token_bytes for c in made] == [1024, 2048, 1024]
        assert [c.max_dispatch_tokens_per_rank for c in made] == [MOST_TOKENS[0]] * 3
        assert [c.enable_mask for c in made] == [False, False, True]
        assert made[0].timeout_ns == int(2 * SOON.finish * 1e9)
        assert [note[0] for note in notes].count("handle") == 3
        assert [note[0] for note in notes].count("dispatch") == 3 + 3  # steps and trials
        opened.close()
        opened.close()
        assert [note[0] for note in notes[-4:]] == ["destroy handle", "destroy group"] * 2
        assert [c[0] for c in library.calls if c[0] in ("init", "destroy", "abort")] == ["init", "destroy"]
        opened.watch.close()


@pytest.mark.mpi(min_size=2, deadline=90)
@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("no network", "NCCL finds no network that GPUs can drive themselves (GIN)"),
        ("no device api", "NCCL says that its device API does not work on this machine"),
        ("wrong rows", "the row of rank 0 did not arrive"),
        ("wrong sums", "the sum of what came home is wrong"),
        ("library", "rows: planted"),
        ("hang", "the first exchange: NCCL is still not ready after 1 s; a rank of the group did not come"),
        ("connection", "RuntimeError: planted in init"),
    ],
)
def test_across_nodes_an_exchange_is_tried(
    comm: "Intracomm", host: Communicator, monkeypatch: pytest.MonkeyPatch, fault: str, reason: str
) -> None:
    """What one rank finds refuses the dispatcher on all, with one text."""
    stand_in_nccl_ep.Installed().put(monkeypatch)
    last = host.rank == host.size - 1
    opened = connect(comm, host, fail="init" if fault == "connection" else "")
    if fault == "hang":
        opened.deadlines = Deadlines(connect=20, start=1, finish=20, abort=1)
    spoil(monkeypatch, fault, last)
    found = opened.try_exchange()
    assert found is not None and reason in found
    assert len(set(host.all_gather_object(found))) == 1
    host.barrier()
    opened.close()
    opened.watch.close()


def spoil(monkeypatch: pytest.MonkeyPatch, fault: str, last: bool) -> None:
    stand_in = stand_in_nccl_ep
    if fault == "no network":
        monkeypatch.setattr(stand_in.Communicator, "gin_type", 0)
    elif fault == "no device api" and last:
        monkeypatch.setattr(stand_in.Communicator, "device_api_support", False)
    elif fault == "wrong rows" and last:
        dispatch = stand_in.Handle.dispatch

        def wrong(self: Any, inputs: Any, outputs: Any, **rest: Any) -> None:
            dispatch(self, inputs, outputs, **rest)
            outputs.tokens.buffer[0, 0, 3] += 1

        monkeypatch.setattr(stand_in.Handle, "dispatch", wrong)
    elif fault in ("wrong sums", "library", "hang") and last:
        combine = stand_in.Handle.combine

        def off(self: Any, inputs: Any, outputs: Any, **rest: Any) -> None:
            combine(self, inputs, outputs, **rest)  # the other ranks must not wait in MPI
            outputs.tokens.buffer[0, 3] += 1
            if fault == "hang":
                time.sleep(4)
            if fault == "library":
                raise stand_in.NcclInvalid("planted")

        monkeypatch.setattr(stand_in.Handle, "combine", off)


@pytest.mark.mpi(min_size=2, deadline=90)
def test_a_connection_that_fails_later_is_one_error(
    comm: "Intracomm", host: Communicator, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in_nccl_ep.Installed().put(monkeypatch)
    opened = connect(comm, host)
    monkeypatch.setattr(
        stand_in_nccl_ep.Group, "create", lambda comm, config: (_ for _ in ()).throw(OSError("no memory"))
    )
    with pytest.raises(AgreedError, match="NCCL EP: no memory"):
        opened.exchange(RowShape(32, 1, 1, 256, torch.float32))
    opened.close()
    opened.watch.close()


def test_widths_and_modes_that_it_cannot_are_one_error(host: Communicator, connections: NcclEp) -> None:
    routing = Routing(torch.zeros(1, 1, dtype=torch.int32), torch.ones(1, 1))
    mover = NcclEpDispatcher(host, Placement.blocks(4, host.size), connections)
    for width, dtype, reason in (
        (260, torch.float32, "rows of 260 values in float32; their width must be a multiple of 256"),
        (256, torch.bfloat16, "their width must be a multiple of 512"),
        (256, torch.float64, "rows in float64; it moves bfloat16, float16, float32"),
    ):
        with pytest.raises(CollectiveError, match=f"dispatcher='nccl-ep': .*{reason}"):
            mover.plan(routing, tag=Tag("layer", 0, 1), hidden_size=width, dtype=dtype)
    sliced = NcclEpDispatcher(host, Placement.blocks(4, 1, host.size), connections)
    if host.size > 1:
        with pytest.raises(CollectiveError, match="a sliced expert sums otherwise; use etp=1"):
            sliced.plan(routing, tag=Tag("layer", 0, 1), hidden_size=256, dtype=torch.float32, exact=True)
    plan = mover.plan(routing, tag=Tag("layer", 0, 1), hidden_size=256, dtype=torch.float32)
    with pytest.raises(RuntimeError, match="combine before dispatch"):
        mover.combine(torch.empty(0, 256), plan)


def test_a_routing_error_is_one_error_everywhere(host: Communicator, connections: NcclEp) -> None:
    mover = NcclEpDispatcher(host, Placement.blocks(4, host.size), connections)
    fine = Routing(torch.zeros(1, 1, dtype=torch.int32), torch.ones(1, 1))
    with pytest.raises(RuntimeError, match="planted"):
        mover.plan(
            ValueError("planted") if host.rank == 0 else fine,
            tag=Tag("layer", 0, 1),
            hidden_size=256,
            dtype=torch.float32,
        )
