"""Which transport is chosen and why, which GPU a rank gets, and which dispatcher; without a GPU."""

import sys
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from launch import mpirun

from xpar.comm.device import binding
from xpar.comm.device.binding import Gpu, driver_version, find_gpu, gpu_index, shared_gpus
from xpar.comm.device.transport import DeviceFacts, choose_transport, host_override
from xpar.comm.dispatch.allgather import AllGatherDispatcher
from xpar.comm.dispatch.alltoall import AllToAllDispatcher
from xpar.comm.dispatch.choose import DISPATCHERS, choose_dispatcher
from xpar.comm.placement import Placement


def facts(
    uuid: str = "a",
    nccl: int | None = 22809,
    problem: str | None = None,
    multi_rank: bool = False,
    mpi_reaches_gpu: bool = False,
) -> DeviceFacts:
    return DeviceFacts(Gpu(0, 1, "GPU", uuid), nccl, problem, multi_rank, mpi_reaches_gpu)


APART = [facts("a"), facts("b")]
NEW_SHARED = [facts("a", 23003, multi_rank=True), facts("a", 23003, multi_rank=True)]
CASES = {
    "one GPU each": (APART, "nccl", "staged: passed over, slower: rows go through host memory"),
    "shared GPU, old NCCL": (
        [facts("b"), facts("a"), facts("a")],
        "staged",
        "ranks 1, 2 share GPU a, which NCCL 2.28.9 refuses",
    ),
    "shared GPU, not enabled": (
        [facts("a", 23007), facts("a", 23007)],
        "staged",
        "accepts only with NCCL_MULTI_RANK_GPU_ENABLE=1",
    ),
    "shared GPU, enabled": (NEW_SHARED, "nccl", "NCCL 2.30.3"),
    "no NCCL on one rank": ([facts("a"), facts("b", None, "no bindings")], "staged", "rank 1: no bindings"),
    "two versions": ([facts("a"), facts("b", 23007)], "staged", "different versions: 2.28.9, 2.30.7"),
    "MPI on one rank only": (
        [facts("a", mpi_reaches_gpu=True), facts("b")],
        "nccl",
        "does not say that it reaches GPU memory (rank 1)",
    ),
    "GPU-aware MPI": (
        [facts("a", mpi_reaches_gpu=True), facts("b", mpi_reaches_gpu=True)],
        "nccl",
        "mpi: passed over, only used when asked for by name",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_choice_and_its_reasons(case: str) -> None:
    ranks, name, reason = CASES[case]
    choice = choose_transport(ranks)
    assert choice.name == name
    assert reason in choice.explain()
    assert sorted([choice.name, *(n for n, _ in choice.rejected)]) == ["mpi", "nccl", "staged"]


def test_a_transport_asked_for_by_name() -> None:
    assert choose_transport(APART, "staged").name == "staged"
    both = [facts(uuid, mpi_reaches_gpu=True) for uuid in "ab"]
    assert choose_transport(both, "mpi").name == "mpi"
    with pytest.raises(ValueError, match=r"transport='mpi': .*rank 0\); choose auto or one of nccl, staged"):
        choose_transport(APART, "mpi")
    with pytest.raises(
        ValueError, match=r"transport='nccl': rank 1: no bindings; choose auto or one of staged$"
    ):
        choose_transport([facts(), facts("b", None, "no bindings")], "nccl")
    assert "pose as hosts" in choose_transport([facts(), facts()], "nccl").reason
    assert "pose as hosts" not in choose_transport(NEW_SHARED, "nccl").reason
    with pytest.raises(ValueError, match="transport='gloo': there is none of that name; choose auto, nccl"):
        choose_transport(APART, "gloo")


def test_ranks_of_one_gpu_pose_as_hosts_and_others_stay_together() -> None:
    """Two nodes of two GPUs; GPU a has three ranks, c two. Every pair on one GPU differs, no two nodes are mixed up."""
    ranks = [replace(facts(uuid), host=host) for uuid, host in zip("abaacdc", "xxxxyyy", strict=True)]
    hosts = [host_override(ranks, r) for r in range(len(ranks))]
    assert hosts == ["x/0", "x/0", "x/1", "x/2", "y/0", "y/0", "y/1"]
    assert (
        [host_override(APART, r) for r in range(2)]
        == [host_override(NEW_SHARED, r) for r in range(2)]
        == [None, None]
    )


def test_nccl_that_does_not_connect_is_passed_over_with_its_reason() -> None:
    choice = choose_transport(APART).without("nccl", "unhandled cuda error")
    assert choice.name == "staged"
    assert dict(choice.rejected)["nccl"] == "unhandled cuda error" and "mpi" in dict(choice.rejected)


@pytest.mark.parametrize(
    ("visible", "local_size", "expected"),
    [(4, 4, [0, 1, 2, 3]), (1, 3, [0, 0, 0]), (4, 2, [0, 1]), (2, 3, [0, 1, 0])],
)
def test_gpus_by_place_on_the_node(visible: int, local_size: int, expected: list[int]) -> None:
    assert [gpu_index(r, visible) for r in range(local_size)] == expected


def test_shared_gpus() -> None:
    assert shared_gpus(["a", "b", "a", "c", "b"]) == {"a": [0, 2], "b": [1, 4]}
    assert shared_gpus(["a", "b"]) == {}


@pytest.mark.parametrize(
    ("text", "version"),
    [
        (
            "NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.159.04  Tue Jan 1\nGCC version: 12.2.0",
            "580.159.04",
        ),
        ("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.86  Release Build", "570.86"),
        ("something else", "unknown"),
        (None, None),
    ],
)
def test_driver_version(
    text: str | None, version: str | None, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(binding, "DRIVER_FILE", str(tmp_path / "version"))
    if text is not None:
        (tmp_path / "version").write_text(text)
    assert driver_version() == version


def test_cuda_without_a_gpu_is_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=r"device='cuda': .*use device='cpu', or check CUDA_VISIBLE_DEVICES"):
        find_gpu(0)


@pytest.mark.parametrize("device", ["cuda", "tpu"])
def test_a_grid_on_a_device_that_is_not_there_is_one_message(device: str) -> None:
    source = (
        "import sys\nfrom xpar.comm import ProcessGrid, World, run\n"
        f"sys.exit(run(lambda: ProcessGrid.create(World.attach(), device={device!r}) and 0))"
    )
    job = mpirun(2, [sys.executable, "-c", source], timeout=40, env={"CUDA_VISIBLE_DEVICES": ""})
    assert job.returncode == 1
    assert job.stderr.count(f"device='{device}': ") == 1 and "Traceback" not in job.stderr


# -- dispatchers ------------------------------------------------------------------------------------------------


def test_dispatchers_for_a_gpu_are_told_apart_by_their_records() -> None:
    world = SimpleNamespace(node_of=(0, 0), window_room=(1 << 40, 1 << 40))
    moe = SimpleNamespace(size=2, world_ranks=(0, 1))
    tp = SimpleNamespace(size=1, world_ranks=(0,))
    grid: Any = SimpleNamespace(
        device=torch.device("cuda"), world=world, moe=moe, tp=tp, shape=SimpleNamespace(tp=1)
    )
    placement = SimpleNamespace(to=lambda device: placement, device=torch.device("cuda"), num_experts=8)
    choice = choose_dispatcher(grid, placement)  # type: ignore[arg-type]
    assert choice.dispatcher.name == "allgather" and choice.dispatcher.whole  # type: ignore[attr-defined]
    assert dict(choice.rejected)["shared-memory"] == "it moves cpu memory, and the job computes on cuda"
    with pytest.raises(ValueError, match="it moves cpu memory"):
        choose_dispatcher(grid, placement, "shared-memory")  # type: ignore[arg-type]
    assert choose_dispatcher(grid, placement, "alltoall").dispatcher.early  # type: ignore[arg-type, attr-defined]
    capturable = {cls.name for cls in DISPATCHERS if cls.capabilities.graph_capture}
    assert capturable == {"allgather"}
    assert not any(cls.capabilities.needs_host_counts for cls in DISPATCHERS if cls.name in capturable)


@pytest.mark.parametrize(("device", "chosen"), [("cpu", "hierarchical"), ("cuda", "alltoall")])
def test_auto_sends_a_row_a_node_from_host_memory_only(device: str, chosen: str) -> None:
    """Eight ranks on two nodes, where it moves fewer bytes: on GPUs it is passed over, and refused when asked for."""
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
    )
    placement: Any = SimpleNamespace(to=lambda device: placement, device=torch.device(device), num_experts=64)
    built: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("xpar.comm.dispatch.choose._build", lambda name, *_: built.append(name))
        rejected = dict(choose_dispatcher(grid, placement, top_k=8).rejected)
    assert built == [chosen]
    if device == "cuda":
        assert rejected["hierarchical"] == "it moves cpu memory, and the job computes on cuda"
        with pytest.raises(ValueError, match="'hierarchical': it moves cpu memory"):
            choose_dispatcher(grid, placement, "hierarchical")


def test_on_host_tables_dispatchers_count() -> None:
    placement = Placement.blocks(4, 2)
    assert not AllGatherDispatcher(None, placement).whole  # type: ignore[arg-type]
    assert not AllToAllDispatcher(None, placement).early  # type: ignore[arg-type]
