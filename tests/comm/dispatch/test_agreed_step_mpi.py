"""Layers of a step whose tokens all ranks have agreed on exchange no handshake of their own."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest
import torch
from all_dispatchers import all_dispatchers
from exact_experts import answer, experts_of, routing_of

from xpar.comm import ProcessGrid, World
from xpar.comm.communicator import Tag
from xpar.comm.dispatch import base
from xpar.comm.dispatch.base import Dispatcher
from xpar.comm.dispatch.choose import choose_dispatcher
from xpar.comm.handshake import CollectiveError, DesyncError
from xpar.comm.placement import Placement
from xpar.comm.watchdog.deadlines import Deadlines
from xpar.comm.watchdog.watchdog import WatchdogOptions
from xpar.kernels.contracts import Routing

if TYPE_CHECKING:
    from mpi4py.MPI import Intracomm

pytestmark = pytest.mark.mpi(min_size=2)
EXPERTS, K, WIDTH = 5, 2, 8


@pytest.fixture(scope="module")
def grid(comm: "Intracomm") -> ProcessGrid:
    return ProcessGrid.create(World.attach(comm))


@pytest.fixture(scope="module")
def comparing(comm: "Intracomm") -> ProcessGrid:
    """As with ``--debug-collectives``."""
    options = WatchdogOptions(check_collectives=True)
    return ProcessGrid.create(World.attach(comm, deadlines=Deadlines(), watchdog=options))


def make(grid: ProcessGrid, name: str) -> Dispatcher:
    return choose_dispatcher(grid, Placement.blocks(EXPERTS, grid.shape.ep), name, top_k=K).dispatcher


@pytest.fixture(autouse=True)
def nothing_agreed_afterwards(grid: ProcessGrid, comparing: ProcessGrid) -> Iterator[None]:
    yield
    grid.agreed.tokens = comparing.agreed.tokens = None


def plan(mover: Dispatcher, routing: Routing | BaseException, exact: bool = False, layer: int = 0) -> Any:
    return mover.plan(
        routing, tag=Tag("layer", layer, 1), hidden_size=WIDTH, dtype=torch.float32, exact=exact
    )


@pytest.mark.parametrize("name", all_dispatchers(min_size=2))
@pytest.mark.parametrize("exact", [False, True], ids=["fast", "exact"])
def test_nothing_is_asked_in_an_agreed_step(
    grid: ProcessGrid, fresh_seed: int, monkeypatch: pytest.MonkeyPatch, name: str, exact: bool
) -> None:
    """Uneven and empty ranks, as in steps that read prompts, several layers one after the other."""
    mover, size, rank = make(grid, name), grid.moe.size, grid.moe.rank
    asked: list[Tag] = []
    ask = base.handshake

    def handshake(group: Any, tag: Tag, **wanted: Any) -> Any:
        asked.append(tag)
        return ask(group, tag, **wanted)

    monkeypatch.setattr(base, "handshake", handshake)
    for step in range(4):
        counts = tuple((3 * r + (step + fresh_seed) * (r + 2)) % 5 for r in range(size))
        grid.agreed.tokens = counts if step < 3 else None
        generator = torch.Generator().manual_seed(fresh_seed + step * size + rank)
        routing = routing_of(counts[rank], K, EXPERTS, generator)
        x = torch.randint(-8, 9, (counts[rank], WIDTH), generator=generator).float()
        planned = plan(mover, routing, exact)
        arrived = mover.dispatch(x, planned).wait()
        made = experts_of(arrived, mover.placement.experts_of(rank), exact)
        got = mover.combine(made, planned).wait().tensor
        assert all(grid.moe.all_gather_object(torch.equal(got, answer(x, routing))))
        assert len(asked) == (step == 3)


def test_an_error_of_one_rank_is_its_own(grid: ProcessGrid) -> None:
    """No other rank waits for it, so it must not look like an error that all ranks have."""
    mover = make(grid, "allgather")
    grid.agreed.tokens = (1,) * grid.moe.size
    with pytest.raises(ValueError, match="planted"):
        plan(mover, ValueError("planted"))
    with pytest.raises(RuntimeError, match="planted") as caught:
        plan(mover, CollectiveError("planted"))
    assert not isinstance(caught.value, CollectiveError)
    two = Routing(torch.zeros(2, K, dtype=torch.int32), torch.ones(2, K))
    with pytest.raises(RuntimeError, match=r"2 tokens in a layer .* announced 1"):
        plan(mover, two)


def test_debug_mode_compares_every_layer(comparing: ProcessGrid) -> None:
    """The first rank that differs is named: in its tokens, in its layer."""
    group = comparing.moe
    mover, last = make(comparing, "allgather"), group.size - 1
    routing = Routing(torch.zeros(1, K, dtype=torch.int32), torch.ones(1, K))
    comparing.agreed.tokens = (1,) * last + (2,)
    with pytest.raises(DesyncError, match=f"rank {group.world_ranks[last]} has 1 tokens, and announced 2"):
        plan(mover, routing)
    comparing.agreed.tokens = (1,) * group.size
    with pytest.raises(DesyncError, match=r"differs: handshake .* layer [34]"):
        plan(mover, routing, layer=3 + (group.rank == last))
    plan(mover, routing)
