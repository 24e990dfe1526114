"""The choice of a dispatcher from the facts of a grid, without ranks and without a GPU."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from xpar.comm.device.nccl_ep_exchange import NcclEp
from xpar.comm.device.nccl_ep_requirements import NcclEpFacts
from xpar.comm.device.peer_memory import PeerAccess
from xpar.comm.device.watch import Watch
from xpar.comm.dispatch.allgather import AllGatherDispatcher
from xpar.comm.dispatch.alltoall import AllToAllDispatcher
from xpar.comm.dispatch.alltoall_early import EarlyAllToAllDispatcher
from xpar.comm.dispatch.base import DispatchRequest
from xpar.comm.dispatch.choose import DISPATCHERS, choose_dispatcher, choose_dispatcher_class
from xpar.comm.placement import Placement
from xpar.comm.watchdog.deadlines import Deadlines


def test_dispatchers_for_a_gpu_follow_from_their_capabilities() -> None:
    world = SimpleNamespace(node_of=(0, 0), window_room=(1 << 40, 1 << 40))
    moe = SimpleNamespace(size=2, world_ranks=(0, 1))
    tp = SimpleNamespace(size=1, world_ranks=(0,))
    grid: Any = SimpleNamespace(
        device=torch.device("cuda"),
        world=world,
        moe=moe,
        tp=tp,
        shape=SimpleNamespace(tp=1),
        agreed=None,
        peer_window=SimpleNamespace(access=PeerAccess(None, (("CUDA IPC handles", "planted"),))),
        nccl_ep=None,
    )
    tables = torch.zeros(9)
    placement: Any = SimpleNamespace(
        to=lambda device: placement, device=torch.device("cuda"), num_experts=8, owner=tables, local=tables
    )
    choice = choose_dispatcher(grid, placement)
    assert choice.dispatcher.name == "allgather" and choice.dispatcher.whole  # type: ignore[attr-defined]
    assert dict(choice.rejected)["one-sided"] == "CUDA IPC handles: planted"
    with pytest.raises(ValueError, match="'one-sided': CUDA IPC handles: planted; choose auto or one of"):
        choose_dispatcher(grid, placement, "one-sided")
    grid.peer_window.access = PeerAccess("CUDA IPC handles")
    assert choose_dispatcher(grid, placement).dispatcher.name == "one-sided"
    grid.peer_window.access = PeerAccess("CUDA IPC handles", (), "ranks 0, 1 share GPU x")
    choice = choose_dispatcher(grid, placement)
    assert choice.dispatcher.name == "allgather"
    assert dict(choice.rejected)["one-sided"] == "ranks 0, 1 share GPU x"
    assert choose_dispatcher(grid, placement, "one-sided").dispatcher.name == "one-sided"
    assert dict(choice.rejected)["shared-memory"] == "it moves cpu memory, and the job computes on cuda"
    with pytest.raises(ValueError, match="it moves cpu memory"):
        choose_dispatcher(grid, placement, "shared-memory")  # type: ignore[arg-type]
    assert type(choose_dispatcher(grid, placement, "alltoall").dispatcher) is EarlyAllToAllDispatcher
    capturable = {cls.name for cls in DISPATCHERS if cls.capabilities.graph_capture}
    assert capturable == {"allgather", "one-sided", "nccl-ep"}
    assert not any(cls.capabilities.needs_host_counts for cls in DISPATCHERS if cls.name in capturable)


@pytest.mark.parametrize(("device", "chosen"), [("cpu", "hierarchical"), ("cuda", "alltoall")])
def test_auto_sends_a_row_a_node_from_host_memory_only(device: str, chosen: str) -> None:
    """Eight ranks on two nodes, where ``hierarchical`` moves fewer bytes.

    On GPUs it is passed over, and refused when asked for.
    """
    ranks = tuple(range(8))
    world = SimpleNamespace(node_of=(0, 0, 0, 0, 1, 1, 1, 1), window_room=(1 << 40,) * 8, node=0)
    moe = SimpleNamespace(size=8, rank=0, world_ranks=ranks)
    grid: Any = SimpleNamespace(
        device=torch.device(device),
        world=world,
        moe=moe,
        moe_node=SimpleNamespace(size=4, rank=0, world_ranks=ranks[:4]),
        tp=SimpleNamespace(size=1, world_ranks=(0,)),
        shape=SimpleNamespace(tp=1, etp=1),
        agreed=None,
        peer_window=None,
        nccl_ep=None,
    )
    placement: Any = SimpleNamespace(to=lambda device: placement, device=torch.device(device), num_experts=64)
    choice = choose_dispatcher_class(grid, placement, request=DispatchRequest(top_k=8))
    assert choice.name == chosen
    rejected = dict(choice.rejected)
    if device == "cuda":
        assert rejected["hierarchical"] == "it moves cpu memory, and the job computes on cuda"
        with pytest.raises(ValueError, match="'hierarchical': it moves cpu memory"):
            choose_dispatcher(grid, placement, "hierarchical")


def on_gpus(ranks: int, nodes: int, problem: str | None = None, access: PeerAccess | None = None) -> Any:
    """The grid of GPU ranks on nodes that have what NCCL's EP extension needs, or a ``problem``."""
    node_of = tuple(r * nodes // ranks for r in range(ranks))
    facts = [NcclEpFacts(f"node {n}", f"GPU-{r}", 132, "", problem) for r, n in enumerate(node_of)]
    moe = SimpleNamespace(size=ranks, rank=0, world_ranks=tuple(range(ranks)), name="moe")
    connections = NcclEp(moe, torch.device("cuda"), Deadlines(), Watch(print), facts)  # type: ignore[arg-type]
    return SimpleNamespace(
        device=torch.device("cuda"),
        world=SimpleNamespace(node_of=node_of, window_room=(1 << 40,) * ranks, node=0),
        moe=moe,
        tp=SimpleNamespace(size=1, world_ranks=(0,)),
        shape=SimpleNamespace(tp=1, etp=1),
        peer_window=SimpleNamespace(access=access or PeerAccess(None, (("peer memory", "2 hosts"),))),
        nccl_ep=connections,
    )


MAPPED = PeerAccess("CUDA IPC handles")
WIDE = DispatchRequest(8, False, 2048, torch.bfloat16)


@pytest.mark.parametrize(
    ("grid", "request_", "chosen", "reason"),
    [
        (on_gpus(16, 2), WIDE, "nccl-ep", None),
        (on_gpus(2, 2), DispatchRequest(top_k=2), "nccl-ep", None),
        (on_gpus(16, 2, "no nvcc"), WIDE, "alltoall", "no nvcc"),
        (on_gpus(4, 2, "no nvcc"), WIDE, "allgather", "no nvcc"),
        (on_gpus(16, 2), replace(WIDE, hidden_size=2880), "alltoall", "rows of 2880 values in bfloat16"),
        (on_gpus(16, 2), replace(WIDE, dtype=torch.float64), "alltoall", "rows in float64"),
        (on_gpus(16, 2), replace(WIDE, top_k=40), "alltoall", "40 experts a token"),
        (on_gpus(4, 1, access=MAPPED), WIDE, "one-sided", "all ranks are on one node"),
        (on_gpus(4, 1), WIDE, "allgather", "all ranks are on one node, and it is for several"),
        (on_gpus(8, 1), WIDE, "alltoall", "all ranks are on one node, and it is for several"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_auto_takes_the_extension_of_nccl_across_nodes(
    grid: Any, request_: DispatchRequest, chosen: str, reason: str | None
) -> None:
    """Where it has what it needs; never before one-sided stores, and what was chosen without it otherwise."""
    placement = Placement.blocks(128, grid.moe.size)
    choice = choose_dispatcher_class(grid, placement, request=request_)
    assert choice.name == chosen
    rejected = dict(choice.rejected).get("nccl-ep")
    assert rejected is None if reason is None else rejected is not None and reason in rejected
    if reason is None or "one node" in reason:
        assert choose_dispatcher_class(grid, placement, "nccl-ep", request_).name == "nccl-ep"
    else:
        with pytest.raises(ValueError, match=f"'nccl-ep': {reason}"):
            choose_dispatcher_class(grid, placement, "nccl-ep", request_)


def test_the_extension_of_nccl_moves_no_codes() -> None:
    grid, placement = on_gpus(2, 2), Placement.blocks(8, 2)
    request = DispatchRequest(2, hidden_size=512, dtype=torch.bfloat16, coded_rows=True)
    assert choose_dispatcher_class(grid, placement, request=request).name != "nccl-ep"
    with pytest.raises(ValueError, match="rows travel as fp8 codes here"):
        choose_dispatcher_class(grid, placement, "nccl-ep", request)


def test_the_extension_of_nccl_is_for_ranks_whose_rows_travel_by_nccl() -> None:
    grid, placement = on_gpus(2, 2), Placement.blocks(8, 2)
    grid.nccl_ep = None
    with pytest.raises(ValueError, match="'nccl-ep': rows do not travel by NCCL in this job; choose auto"):
        choose_dispatcher_class(grid, placement, "nccl-ep")
    grid.moe.size = 1
    with pytest.raises(ValueError, match="'nccl-ep': a group of one rank has no peers"):
        choose_dispatcher_class(grid, placement, "nccl-ep")
    grid.device = torch.device("cpu")
    with pytest.raises(ValueError, match="'nccl-ep': it moves cuda memory, and the job computes on cpu"):
        choose_dispatcher_class(grid, placement, "nccl-ep")


def test_on_the_host_dispatchers_count_rows() -> None:
    placement = Placement.blocks(4, 2)
    assert not AllGatherDispatcher(None, placement).whole  # type: ignore[arg-type]
    grid = on_gpus(2, 2)
    grid.device, grid.agreed = torch.device("cpu"), None
    assert type(choose_dispatcher(grid, placement, "alltoall").dispatcher) is AllToAllDispatcher
