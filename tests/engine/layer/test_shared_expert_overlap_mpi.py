"""The shared experts compute when they are told to, and no order changes a bit of the output."""

import gc
import weakref
from contextlib import nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch

from xpar.comm import ProcessGrid, RemoteRankError, World
from xpar.comm.communicator import Pending
from xpar.comm.partition import split_range
from xpar.engine.config import LayerConfig, RouterConfig, SharedConfig
from xpar.engine.layer.build import build_layer
from xpar.engine.layer.options import LayerOptions
from xpar.engine.layer.runner import MoERunner
from xpar.engine.layer.shared_expert_overlap import SIDE_STREAM_TOKENS, Overlap, SharedOrder
from xpar.engine.synthetic.layer import SyntheticLayer

if TYPE_CHECKING:
    from mpi4py.MPI import Intracomm

pytestmark = pytest.mark.mpi
CONFIG = LayerConfig(6, 32, 24, RouterConfig(2), shared=SharedConfig(20, gated=True))
ON_HOST = [order for order in SharedOrder if order is not SharedOrder.SIDE_STREAM]
MOVES = ("plan", "dispatch", "arrived", "combine", "returned")


@pytest.fixture(scope="module")
def world(comm: "Intracomm") -> World:
    return World.attach(comm)


def watched(runner: MoERunner, events: list[str]) -> MoERunner:
    """``runner``, which from now on tells ``events`` what it does, in order."""
    mover, shared = runner.dispatcher, runner.shared
    assert shared is not None

    def told(name: str, call: Any) -> Any:
        def tell(*args: Any, **keywords: Any) -> Any:
            events.append(name)
            return call(*args, **keywords)

        return tell

    def waited(name: str, begin: Any) -> Any:
        return lambda *args: Pending(told(name, begin(*args).wait))

    mover.plan = told("plan", mover.plan)  # type: ignore[method-assign]
    mover.dispatch = waited("arrived", told("dispatch", mover.dispatch))  # type: ignore[method-assign]
    mover.combine = waited("returned", told("combine", mover.combine))  # type: ignore[method-assign]
    runner.shared = told("shared", shared)
    return runner


@pytest.mark.parametrize("dispatcher", ["shared-memory", "allgather", "alltoall"])
def test_every_order_gives_the_same_bits(world: World, fresh_seed: int, dispatcher: str) -> None:
    layer = SyntheticLayer(CONFIG, torch.float32, fresh_seed)
    x = torch.randn(11, 32, generator=torch.Generator().manual_seed(fresh_seed))
    x = x[split_range(11, world.size, world.rank)]
    grid = ProcessGrid.create(world)
    outputs = []
    for order in ON_HOST:
        options = LayerOptions(dispatcher, shared_order=order)
        outputs.append(build_layer(CONFIG, grid, torch.float32, layer.read, options)(x))
    torch.testing.assert_close(outputs[0], layer.reference(x)[0], rtol=1e-4, atol=1e-5)
    assert all(torch.equal(output, outputs[0]) for output in outputs)


@pytest.mark.parametrize(
    ("order", "place"),
    [
        (SharedOrder.BEFORE, 0),
        (SharedOrder.DURING_DISPATCH, 2),
        (SharedOrder.AUTO, 2),
        (SharedOrder.DURING_COMBINE, 4),
        (SharedOrder.NONE, 5),
    ],
    ids=lambda value: getattr(value, "value", None),
)
def test_when_they_compute(world: World, order: SharedOrder, place: int) -> None:
    layer = SyntheticLayer(CONFIG, torch.float32, 0)
    options = LayerOptions("alltoall", shared_order=order)
    events: list[str] = []
    runner = watched(
        build_layer(CONFIG, ProcessGrid.create(world), torch.float32, layer.read, options), events
    )
    runner(torch.zeros(3, 32))
    assert events == [*MOVES[:place], "shared", *MOVES[place:]]


@pytest.mark.parametrize("order", ON_HOST, ids=lambda order: order.value)
def test_a_failure_of_one_rank_is_one_error_before_the_shared_experts_see_the_tokens(
    world: World, order: SharedOrder
) -> None:
    layer = SyntheticLayer(CONFIG, torch.float32, 0)
    options = LayerOptions("alltoall", shared_order=order)
    runner = build_layer(CONFIG, ProcessGrid.create(world), torch.float32, layer.read, options)
    width = 31 if world.rank == world.size - 1 else 32
    with pytest.raises(RemoteRankError, match=r"hidden_states of shape \(3, 31\): expected \[tokens, 32\]"):
        runner(torch.zeros(3, width))


def test_the_device_and_the_tokens_choose() -> None:
    cuda, host = torch.device("cuda", 0), torch.device("cpu")
    auto = Overlap(SharedOrder.AUTO, cuda)
    assert auto.order_of(SIDE_STREAM_TOKENS) is SharedOrder.SIDE_STREAM
    assert auto.order_of(SIDE_STREAM_TOKENS + 1) is SharedOrder.DURING_DISPATCH
    assert Overlap(SharedOrder.AUTO, host).order_of(1) is SharedOrder.DURING_DISPATCH
    with pytest.raises(ValueError, match="shared_order='side_stream' on cpu: only GPUs have streams"):
        Overlap(SharedOrder.SIDE_STREAM, host)


def test_what_the_side_stream_reads_lives_until_the_join(
    world: World, fresh_seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A GPU's allocator gives memory that nobody refers to away at once, also inside a graph that is being
    # captured, while the kernels of the other stream have not read it yet.
    class Stream:
        def __init__(self, *_: object) -> None: ...

        def wait_stream(self, other: "Stream") -> None: ...

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: None)
    layer = SyntheticLayer(CONFIG, torch.float32, fresh_seed)
    options = LayerOptions(depth="steps")
    runner = build_layer(CONFIG, ProcessGrid.create(world), torch.float32, layer.read, options)
    runner.overlap.order_of = lambda tokens: SharedOrder.SIDE_STREAM  # type: ignore[method-assign]
    shared, read = runner.shared, []
    assert shared is not None

    def watch(hidden_states: torch.Tensor, logits: torch.Tensor | None) -> Any:
        read.extend(weakref.ref(tensor) for tensor in (hidden_states, logits) if tensor is not None)
        return shared(hidden_states, logits)

    runner.shared = watch  # type: ignore[assignment]
    step = runner.start(torch.zeros(3, 32))
    gc.collect()
    assert len(read) == 2
    assert all(tensor() is not None for tensor in read)
    runner.complete(step).sum()
    del step
    gc.collect()
    assert read[1]() is None


def test_a_layer_without_shared_experts(world: World, fresh_seed: int) -> None:
    config = replace(CONFIG, shared=None)
    layer = SyntheticLayer(config, torch.float32, fresh_seed)
    options = LayerOptions(shared_order=SharedOrder.BEFORE)
    runner = build_layer(config, ProcessGrid.create(world), torch.float32, layer.read, options)
    x = torch.randn(4, 32, generator=torch.Generator().manual_seed(fresh_seed + world.rank))
    torch.testing.assert_close(runner(x), layer.reference(x)[0], rtol=1e-4, atol=1e-5)
