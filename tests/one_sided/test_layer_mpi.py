"""A layer whose shared experts and bias are added where its routed output comes home."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from quantised_on_arrival import on_arrival

from xpar.comm import ProcessGrid, World
from xpar.comm.device.peer_window import PeerWindow
from xpar.comm.dispatch.allgather import AllGatherDispatcher
from xpar.comm.dispatch.base import Dispatcher
from xpar.comm.dispatch.one_sided import OneSidedDispatcher
from xpar.engine.config import StoredActivations
from xpar.engine.layer.build import build_layer
from xpar.engine.layer.options import LayerOptions
from xpar.engine.layer.runner import MoERunner
from xpar.engine.synthetic.layer import SyntheticLayer
from xpar.engine.synthetic.shapes import shape_of
from xpar.kernels.quantisation import NAMED_FORMATS
from xpar.kernels.quantised_weight import ActivationScheme

pytestmark = pytest.mark.mpi(deadline=120)


def through(runner: MoERunner, mover: Dispatcher, bias: torch.Tensor | None) -> MoERunner:
    """The same layer with another dispatcher."""
    return MoERunner(
        runner.config,
        runner.grid,
        runner.router,
        replace(runner.experts, dispatcher=mover),
        dtype=runner.dtype,
        shared=runner.shared,
        output_bias=bias,
        options=runner.options,
    )


@pytest.mark.parametrize("exact", [False, True], ids=["fast", "exact"])
@pytest.mark.parametrize("has_bias", [False, True], ids=["no bias", "bias"])
def test_the_sum_is_that_of_the_parts(
    world: World,
    window: PeerWindow,
    fresh_seed: int,
    monkeypatch: pytest.MonkeyPatch,
    has_bias: bool,
    exact: bool,
) -> None:
    grid = ProcessGrid.create(world)
    layer = SyntheticLayer(shape_of("qwen2-57b-a14b").layer(0.0625), torch.float32, fresh_seed)
    options = LayerOptions(dispatcher="allgather" if world.size > 1 else "auto", exact=exact)
    runner = build_layer(layer.config, grid, torch.float32, layer.read, options)
    assert runner.shared is not None
    h = layer.config.hidden_size
    bias = torch.randn(h, generator=torch.Generator().manual_seed(fresh_seed)) if has_bias else None
    placement = runner.dispatcher.placement
    ours = through(runner, OneSidedDispatcher(grid.moe, placement, window), bias)
    theirs = through(runner, AllGatherDispatcher(grid.moe, placement, whole=not exact), bias)
    added: list[Any] = []
    add = OneSidedDispatcher.add_at_home
    monkeypatch.setattr(OneSidedDispatcher, "add_at_home", lambda *args: added.append(args[2:]) or add(*args))
    x = torch.randn(2 + world.rank, h, generator=torch.Generator().manual_seed(fresh_seed + world.rank))
    got = ours(x)
    assert len(added) == (not exact)
    assert exact or ((added[0][0] is not None) == has_bias and added[0][1] is not None)
    residual = torch.randn(x.shape, generator=torch.Generator().manual_seed(fresh_seed))
    with_residual = ours(x, residual=residual)
    assert exact or added.pop()[2] is not None
    fine = torch.allclose(got, theirs(x), rtol=1e-5, atol=1e-6)
    routed, shared = ours.forward_separately(x)
    fine = fine and torch.equal(with_residual, got + residual)
    fine = fine and len(added) == (not exact) and shared is not None and torch.equal(routed + shared, got)
    assert all(grid.moe.all_gather_object(fine))


@pytest.mark.parametrize("size", [128, 0], ids=["by 128", "by token"])
@pytest.mark.parametrize("kernel", ["reference", "onednn"])
def test_rows_of_codes_travel_as_opaque_words(
    world: World, window: PeerWindow, fresh_seed: int, kernel: str, size: int
) -> None:
    """With the bits of rows that become codes on arrival, and near all-gather's sums of other batches."""
    grid, fmt = ProcessGrid.create(world), NAMED_FORMATS["fp8"]
    stored = StoredActivations(ActivationScheme(size))
    config = replace(shape_of("olmoe").layer(0.0625), activations=stored)
    layer = SyntheticLayer(config, torch.bfloat16, fresh_seed, fmt)
    mover = "allgather" if world.size > 1 else "auto"
    options = LayerOptions(dispatcher=mover, kernel=kernel, activations="quantised")
    runner = build_layer(config, grid, torch.bfloat16, layer.read, options, weight_format=fmt)
    placement = runner.dispatcher.placement
    both = OneSidedDispatcher(grid.moe, placement, window), AllGatherDispatcher(grid.moe, placement)
    for dispatcher in both:
        dispatcher.row_bytes = runner.experts.row_bytes
    ours, theirs = (through(runner, dispatcher, None) for dispatcher in both)
    count = 0 if world.rank == 1 else 3 + world.rank
    generator = torch.Generator().manual_seed(fresh_seed + world.rank)
    x = torch.randn(count, config.hidden_size, generator=generator).bfloat16()
    got, near = ours(x), theirs(x)
    fine = torch.equal(got, on_arrival(ours)(x)) and torch.allclose(got, near, rtol=2e-2, atol=1e-2)
    assert all(grid.moe.all_gather_object(fine))
