"""Every transport of device tensors against MPI on the host, on CPU tensors.

NCCL is replaced at its narrow interface.
"""

import time
from typing import TYPE_CHECKING

import pytest
import torch
from exact_experts import answer, experts_of, routing_of
from fake_nccl import FakeNccl
from hypothesis import given, settings
from hypothesis import strategies as st

from xpar.comm import AgreedError, World
from xpar.comm.communicator import Communicator, SoloCommunicator, Tag
from xpar.comm.device.mpi_backend import claims_cuda, find_mpi_libraries
from xpar.comm.device.nccl_library import NcclError
from xpar.comm.device.transport import Transport, open_transport
from xpar.comm.device.transport_choice import TRANSPORTS, TransportChoice
from xpar.comm.dispatch.allgather import AllGatherDispatcher
from xpar.comm.dispatch.alltoall_early import EarlyAllToAllDispatcher
from xpar.comm.placement import Placement
from xpar.comm.watchdog.deadlines import Deadlines
from xpar.kernels.choice import Choice

if TYPE_CHECKING:
    from mpi4py.MPI import Intracomm

pytestmark = pytest.mark.mpi
HOST = torch.device("cpu")
SOON = Deadlines(connect=0.3, launch=0.3, abort=0.3)
MOVED = [torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.uint8, torch.int64]
SUMMED = [torch.float32, torch.bfloat16, torch.float16, torch.int32]
KINDS = ["nccl", "nccl-without-alltoall", "staged", "mpi"]


@pytest.fixture(scope="module")
def host(comm: "Intracomm") -> Communicator:
    return World.attach(comm).comm


def asked_for(name: str) -> TransportChoice:
    return Choice(next(t for t in TRANSPORTS if t.name == name), ())


def opened(comm: "Intracomm", host: Communicator, kind: str) -> Transport:
    name = kind.split("-")[0]
    library = FakeNccl(comm, release=22700 if kind != name else 22809)
    choice = asked_for(name)
    return open_transport(host, HOST, choice, Deadlines(), required=True, library=library)


@pytest.fixture(scope="module", params=KINDS)
def group(request: pytest.FixtureRequest, comm: "Intracomm", host: Communicator) -> Communicator:
    transport = opened(comm, host, request.param)
    request.addfinalizer(transport.close)
    return transport.wrap(host)


def rows_of(rank: int, seed: int, rows: int, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed * 1000 + rank)
    return (torch.randn(rows, 5, generator=generator) * 20).to(dtype)


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


@pytest.mark.parametrize("counts", ["equal", "uneven", "empty"])
@pytest.mark.parametrize("dtype", MOVED, ids=str)
def test_an_all_gather_brings_the_rows_of_all_ranks(
    group: Communicator, host: Communicator, fresh_seed: int, dtype: torch.dtype, counts: str
) -> None:
    rows = [{"equal": 3, "uneven": (2 * r) % 5, "empty": 0}[counts] for r in range(group.size)]
    x = rows_of(group.rank, fresh_seed, rows[group.rank], dtype)
    want = host.all_gather_v(x, rows)
    assert same(group.all_gather_v(x, rows), want)
    assert same(group.all_gather_v(torch.cat([x, x], dim=1)[:, :5]), want)


@pytest.mark.parametrize("skip", [False, True], ids=["all", "own_skipped"])
@pytest.mark.parametrize("dtype", MOVED, ids=str)
def test_an_all_to_all_brings_what_mpi_brings(
    group: Communicator, host: Communicator, fresh_seed: int, dtype: torch.dtype, skip: bool
) -> None:
    def count(source: int, target: int) -> int:
        return 0 if skip and source == target else (source * 3 + target * 2) % 4

    send = [count(group.rank, t) for t in range(group.size)]
    recv = [count(s, group.rank) for s in range(group.size)]
    if skip:
        recv[group.rank] = 2
    x = rows_of(group.rank, fresh_seed, sum(send), dtype)
    results = []
    for mover in (host, group):
        out = rows_of(99, fresh_seed, sum(recv), dtype)
        results.append(mover.all_to_all_v(x, send, recv, out, group.rank if skip else None).wait())
    if group.size > 1:
        assert results[1] is out
    assert same(results[0], results[1])


@pytest.mark.parametrize("rows", [0, 1, 7, 3001], ids="rows{}".format)
@pytest.mark.parametrize("dtype", SUMMED, ids=str)
def test_sums_have_the_bits_of_mpi(
    group: Communicator, host: Communicator, fresh_seed: int, dtype: torch.dtype, rows: int
) -> None:
    x = rows_of(group.rank, fresh_seed, rows, dtype)
    assert same(group.all_reduce(x), host.all_reduce(x))
    counts = [rows // group.size + (r < rows % group.size) for r in range(group.size)]
    assert same(group.reduce_scatter_v(x, counts), host.reduce_scatter_v(x, counts))


def test_broadcast_and_split(group: Communicator, fresh_seed: int) -> None:
    root = group.size - 1
    x = rows_of(group.rank, fresh_seed, 3, torch.bfloat16)
    assert group.broadcast(x, root) is x
    assert same(x, rows_of(root, fresh_seed, 3, torch.bfloat16))
    number = torch.tensor(group.rank)
    assert int(group.broadcast(number, root)) == root
    part = group.split(group.rank % 2, -group.rank, "parity")
    expected = [r for r in reversed(range(group.size)) if r % 2 == group.rank % 2]
    assert part.world_ranks == tuple(expected) and type(part) in (type(group), SoloCommunicator)
    assert int(part.all_reduce(torch.tensor([group.rank]))) == sum(expected)


@settings(max_examples=25)
@given(data=st.data())
@pytest.mark.parametrize("kind", ["whole", "early", "early-large"])
def test_dispatchers_that_work_as_on_a_gpu_give_the_reference(
    group: Communicator, kind: str, data: st.DataObject
) -> None:
    """Uneven and empty ranks, sliced experts, ranks without experts, dropped slots, exact mode."""
    size, rank = group.size, group.rank
    etp = data.draw(st.sampled_from([n for n in (1, 2) if size % n == 0]), label="etp")
    num_experts = data.draw(st.integers(1, 9), label="experts")
    k = data.draw(st.integers(1, num_experts), label="top_k")
    counts = data.draw(st.lists(st.integers(0, 9), min_size=size, max_size=size), label="tokens")
    exact = etp == 1 and data.draw(st.booleans(), label="exact")
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 9999), label="seed") * size + rank)
    routing = routing_of(counts[rank], k, num_experts, generator)
    x = torch.randint(-8, 9, (counts[rank], 6), generator=generator).float()
    placement = Placement.blocks(num_experts, size // etp, etp)
    mover = (
        AllGatherDispatcher(group, placement, whole=True)
        if kind == "whole"
        else EarlyAllToAllDispatcher(group, placement)
    )
    plan = mover.plan(routing, tag=Tag("layer", 0, 1), hidden_size=6, dtype=x.dtype, exact=exact)
    with pytest.MonkeyPatch.context() as patch:
        if kind == "early-large":  # as if packing the bound moved too much
            patch.setattr("xpar.comm.dispatch.alltoall_early.EARLY_BYTES", -1)
        arrived = mover.dispatch(x, plan).wait()
    held = placement.experts_of(rank // etp)
    made = experts_of(arrived, held, exact) / etp if held else x.new_empty(0, 6)
    got = mover.combine(made, plan).wait().tensor
    assert torch.equal(got, answer(x, routing))
    if kind != "whole":
        reached = [{int(placement.owner[e]) for e in row if e >= 0} for row in routing.topk_ids.tolist()]
        assert plan.traffic.rows == etp * sum(map(len, reached))
        assert plan.traffic.remote_rows == sum(etp * len(d) - (rank // etp in d) for d in reached)


# -- NCCL's faults ------------------------------------------------------------------------------------------


def connect(
    host: Communicator, library: FakeNccl, deadlines: Deadlines = SOON, required: bool = True
) -> Transport:
    choice = asked_for("nccl")
    return open_transport(host, HOST, choice, deadlines, required=required, library=library)


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize(
    ("fault", "where", "message"),
    [
        ({"fail": "unique_id"}, 0, "rank 0: RuntimeError: planted in unique_id"),
        ({"fail": "init"}, "all", "planted in init"),
        ({"stuck": True}, -1, r"still not ready after 0.3 s.*NCCL 2.28.9"),
        ({"result": 3}, 0, "NCCL result 3: planted error"),
        ({"fail": "send"}, "all", "planted in send"),
    ],
    ids=["unique_id", "init", "never_ready", "failed", "self_test"],
)
def test_one_ranks_failure_to_connect_is_one_error_everywhere(
    comm: "Intracomm", host: Communicator, fault: dict, where: int | str, message: str
) -> None:  # type: ignore[type-arg]
    faulty = where == "all" or host.rank == (host.size - 1 if where == -1 else where)
    library = FakeNccl(comm, **(fault if faulty else {}))
    with pytest.raises(AgreedError, match=message) as caught:
        connect(host, library)
    assert len(set(host.all_gather_object(str(caught.value)))) == 1
    assert host.all_gather_object("still in step") == ["still in step"] * host.size


@pytest.mark.mpi(min_size=2)
def test_rows_are_staged_where_nccl_does_not_connect(comm: "Intracomm", host: Communicator) -> None:
    transport = connect(host, FakeNccl(comm, fail="unique_id"), required=False)
    assert transport.choice.name == "staged"
    assert (
        "nccl: passed over, NCCL for group world: rank 0: RuntimeError: planted" in transport.choice.explain()
    )
    group = transport.wrap(host)
    assert group.all_gather_v(torch.tensor([group.rank])).tolist() == list(range(group.size))


@pytest.mark.mpi(min_size=2)
def test_a_broken_group_refuses_at_once(comm: "Intracomm", host: Communicator) -> None:
    library = FakeNccl(comm)
    group = connect(host, library).wrap(host)
    library.fail = "all_gather"
    ones, rows = [1] * group.size, torch.ones(group.size, 2)
    with pytest.raises(NcclError, match="planted in all_gather"):
        group.all_gather_v(rows[:1], ones)
    assert library.calls[-1] == ("abort",)
    with pytest.raises(NcclError, match="group world is broken since: all_gather"):
        group.all_to_all_v(rows, ones, ones)


def inits(library: FakeNccl) -> list[bool]:
    """How this rank joined each communicator: by calls that block, or not."""
    return [call[3] for call in library.calls if call[0] == "init"]


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("fault", ["never joins", "no exchange"])
def test_a_connection_whose_calls_do_not_block_serves_on(
    comm: "Intracomm", host: Communicator, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where one rank cannot join by calls that block, or the trial exchange by them hangs."""
    library = FakeNccl(comm)
    if host.rank == host.size - 1 and fault == "never joins":
        library.stuck_blocking = True
    elif fault == "no exchange":
        begin = FakeNccl.group_start
        monkeypatch.setattr(
            FakeNccl,
            "group_start",
            lambda self: time.sleep(3600) if inits(self)[-1] else begin(self),
        )
    begun = time.monotonic()
    transport = connect(host, library)
    assert time.monotonic() - begun < 20 and inits(library) == [False, True]
    monkeypatch.undo()
    group = transport.wrap(host)
    assert group.all_gather_v(torch.tensor([group.rank]), [1] * group.size).tolist() == list(
        range(group.size)
    )
    assert not [c for c in library.calls if c[0] == "abort"]  # NCCL allows none under a call
    transport.close()


@pytest.mark.mpi(min_size=2)
def test_a_launch_by_a_call_that_blocks_is_one_call(comm: "Intracomm", host: Communicator) -> None:
    """No group, no question about its state."""
    library = FakeNccl(comm)
    group = connect(host, library).wrap(host)
    library.calls.clear()
    asked: list[int] = []
    library.state = lambda comm: asked.append(1) or 0  # type: ignore[assignment, func-returns-value]
    library.group_start = lambda: asked.append(2)  # type: ignore[assignment]
    group.all_gather_v(torch.ones(3, 2), [3] * group.size)
    assert [c[0] for c in library.calls] == ["all_gather"] and not asked


@pytest.mark.mpi(min_size=2)
def test_groups_of_the_same_ranks_share_a_connection(comm: "Intracomm", host: Communicator) -> None:
    library = FakeNccl(comm)
    transport = connect(host, library)
    world = transport.wrap(host)
    same_ranks = world.split(0, host.rank, "moe")
    assert inits(library) == [False, True]  # the second time by calls that block
    reordered = world.split(0, -host.rank, "reordered")
    assert inits(library) == [False, True] * 2
    assert same_ranks.all_gather_v(torch.tensor([host.rank])).tolist() == list(range(host.size))
    assert reordered.all_gather_v(torch.tensor([host.rank])).tolist() == list(range(host.size))[::-1]
    transport.close()
    assert [c[0] for c in library.calls[-4:]] == ["finalize", "destroy"] * 2


@pytest.mark.mpi(min_size=2)
def test_equal_sizes_use_ncclalltoall_and_others_do_not(comm: "Intracomm", host: Communicator) -> None:
    library = FakeNccl(comm)
    group = connect(host, library).wrap(host)
    x = torch.ones(group.size * 4, 2)
    for counts, expected in (
        ([4] * group.size, {"all_to_all"}),
        ([8, 0, *[4] * (group.size - 2)], {"send", "recv"}),
    ):
        library.calls.clear()
        group.reduce_scatter_v(x, counts)
        used = {c[0] for c in library.calls}
        assert used <= expected and (used or group.size == 2 or not counts[group.rank])


def test_mpi_claims_nothing_that_this_machine_has_not(comm: "Intracomm") -> None:
    """Asking must work with this MPI library, and no CPU build of one reaches GPU memory."""
    assert find_mpi_libraries()
    assert claims_cuda() is False
