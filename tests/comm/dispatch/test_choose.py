"""The choice of a dispatcher from the facts of a grid, without ranks and without a GPU."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from xpar.comm.device.peer_memory import PeerAccess
from xpar.comm.dispatch.allgather import AllGatherDispatcher
from xpar.comm.dispatch.alltoall import AllToAllDispatcher
from xpar.comm.dispatch.base import DispatchRequest
from xpar.comm.dispatch.choose import DISPATCHERS, choose_dispatcher, choose_dispatcher_class
from xpar.comm.placement import Placement


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
    assert choose_dispatcher(grid, placement, "alltoall").dispatcher.early  # type: ignore[arg-type, attr-defined]
    capturable = {cls.name for cls in DISPATCHERS if cls.capabilities.graph_capture}
    assert capturable == {"allgather", "one-sided"}
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
    )
    placement: Any = SimpleNamespace(to=lambda device: placement, device=torch.device(device), num_experts=64)
    choice = choose_dispatcher_class(grid, placement, request=DispatchRequest(top_k=8))
    assert choice.name == chosen
    rejected = dict(choice.rejected)
    if device == "cuda":
        assert rejected["hierarchical"] == "it moves cpu memory, and the job computes on cuda"
        with pytest.raises(ValueError, match="'hierarchical': it moves cpu memory"):
            choose_dispatcher(grid, placement, "hierarchical")


def test_on_the_host_dispatchers_count_rows() -> None:
    placement = Placement.blocks(4, 2)
    assert not AllGatherDispatcher(None, placement).whole  # type: ignore[arg-type]
    assert not AllToAllDispatcher(None, placement).early  # type: ignore[arg-type]
