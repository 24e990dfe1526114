"""What is chosen of a batch's memory is one error on all ranks, where one of them cannot choose."""

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch

from xpar.comm import AgreedError, World
from xpar.engine.generation import kv_memory
from xpar.engine.generation.generate import settle_room

if TYPE_CHECKING:
    from mpi4py.MPI import Intracomm

pytestmark = pytest.mark.mpi(min_size=2)


def test_a_rank_whose_memory_is_unknown_is_one_error_everywhere(
    comm: "Intracomm", monkeypatch: pytest.MonkeyPatch
) -> None:
    world = World.attach(comm)

    def free_share(loaded: Any) -> int:
        if world.rank == world.size - 1:
            raise ValueError("no memory is known")
        return 2**40

    monkeypatch.setattr(kv_memory, "free_share", free_share)
    monkeypatch.setattr(kv_memory, "flat_forms", lambda loaded: ())
    monkeypatch.setattr(kv_memory, "gpu_step_bytes", lambda loaded, tokens: 0)
    loaded: Any = SimpleNamespace(device=torch.device("cuda"))
    request: Any = SimpleNamespace(prefill_tokens=None)
    work: Any = SimpleNamespace(queue=[])
    with pytest.raises(AgreedError, match=f"^rank {world.size - 1}: no memory is known$"):
        settle_room(world.comm, request, work, loaded)
    assert world.comm.all_gather_object(world.rank) == list(range(world.size))
