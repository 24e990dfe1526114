"""The choice of a transport and of a rank's GPU, without a GPU."""

import threading
from dataclasses import replace
from typing import Any

import pytest
import torch
from launch import mpirun, python_program

from xpar.comm.device import binding
from xpar.comm.device.binding import Gpu, driver_version, find_gpu, gpu_index, shared_gpus
from xpar.comm.device.staged_backend import StagedBackend
from xpar.comm.device.transport import Transport
from xpar.comm.device.transport_choice import (
    TRANSPORTS,
    DeviceFacts,
    choose_transport,
    fall_back,
    host_override,
)
from xpar.comm.device.watch import Watch
from xpar.kernels.choice import Choice


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
def test_the_choice_says_why_it_fits_the_facts(case: str) -> None:
    ranks, name, reason = CASES[case]
    choice = choose_transport(ranks)
    assert choice.name == name
    assert reason in choice.explain()
    assert {choice.name, *dict(choice.rejected)} == {t.name for t in TRANSPORTS}


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
    assert "as separate hosts" in choose_transport([facts(), facts()], "nccl").reason
    assert "as separate hosts" not in choose_transport(NEW_SHARED, "nccl").reason
    with pytest.raises(
        ValueError, match="transport='gloo': there is none of that name; choose auto or one of nccl"
    ):
        choose_transport(APART, "gloo")


def test_ranks_of_one_gpu_give_different_hosts_and_others_stay_together() -> None:
    """Two nodes of two GPUs, of which GPU a has three ranks and c two.

    Every pair on one GPU differs, and no two nodes are mixed up.
    """
    ranks = [replace(facts(uuid), host=host) for uuid, host in zip("abaacdc", "xxxxyyy", strict=True)]
    hosts = [host_override(ranks, r) for r in range(len(ranks))]
    assert hosts == ["x/0", "x/0", "x/1", "x/2", "y/0", "y/0", "y/1"]
    assert (
        [host_override(APART, r) for r in range(2)]
        == [host_override(NEW_SHARED, r) for r in range(2)]
        == [None, None]
    )


def test_nccl_that_does_not_connect_is_passed_over_with_its_reason() -> None:
    choice = fall_back(choose_transport(APART), "unhandled cuda error")
    assert choice.name == "staged"
    assert dict(choice.rejected)["nccl"] == "unhandled cuda error" and "mpi" in dict(choice.rejected)


@pytest.mark.parametrize(
    ("visible", "local_size", "expected"),
    [(4, 4, [0, 1, 2, 3]), (1, 3, [0, 0, 0]), (4, 2, [0, 1]), (2, 3, [0, 1, 0])],
)
def test_a_rank_gets_the_gpu_of_its_index_on_the_node(
    visible: int, local_size: int, expected: list[int]
) -> None:
    assert [gpu_index(r, visible) for r in range(local_size)] == expected


def test_ranks_are_grouped_by_the_gpu_that_they_share() -> None:
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
def test_the_driver_version_is_read_from_its_file(
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
    job = mpirun(2, python_program("create_grid", device), timeout=40, env={"CUDA_VISIBLE_DEVICES": ""})
    assert job.returncode == 1
    assert job.stderr.count(f"device='{device}': ") == 1 and "Traceback" not in job.stderr


def test_a_recorded_step_is_followed_with_a_deadline() -> None:
    """By the watch, where there is one."""
    found: list[str] = []
    late = threading.Event()
    watch = Watch(lambda problem: (found.append(problem), late.set()), pause=0.01)
    choice = Choice(next(t for t in TRANSPORTS if t.name == "nccl"), ())
    host = torch.device("cpu")
    followed = Transport(choice, host, lambda group: StagedBackend(group, host), watch, finish=0.05)
    followed._markers.record = lambda: lambda: False  # type: ignore[method-assign, assignment]
    followed.follow("a recorded step")
    assert late.wait(5) and found[0].startswith("a recorded step: not done on the GPU 0.05 s after")
    followed.close()
    unwatched = Transport(choice, host, lambda group: StagedBackend(group, host))
    unwatched.follow("a recorded step")
    unwatched.close()
