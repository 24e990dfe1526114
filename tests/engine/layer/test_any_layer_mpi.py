"""Any layer on any grid, taken any way, equals its fp32 reference: router, biases, activation, shared
experts, tokens."""

from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from xpar.comm import ProcessGrid, World
from xpar.comm.dispatch.choose import DISPATCHERS, choose_dispatcher
from xpar.comm.placement import Placement
from xpar.comm.reduction import to_full
from xpar.engine.config import LayerConfig, RouterConfig, SharedConfig
from xpar.engine.layer.build import build_layer
from xpar.engine.layer.fused_shared_experts import count_shared_slots
from xpar.engine.layer.micro_batches import MicroBatches
from xpar.engine.layer.options import LayerOptions
from xpar.engine.layer.shared_expert_overlap import SharedOrder
from xpar.engine.synthetic.layer import SyntheticLayer
from xpar.kernels.contracts import Activation

if TYPE_CHECKING:
    from mpi4py.MPI import Intracomm

pytestmark = pytest.mark.mpi(deadline=300)
HIDDEN = 24
ROUTERS = (
    RouterConfig(2),
    RouterConfig(3, scoring="sigmoid", correction_bias=True, routed_scaling_factor=2.5),
    RouterConfig(2, num_expert_group=2, topk_group=1, group_score="top2_sum", renormalize=False),
    RouterConfig(4, choice="logits", logits_dtype="float32"),
    RouterConfig(1, choice="logits", scoring="sigmoid", renormalize=False, weight_on_input=True),
    RouterConfig(2, choice="sparsemixer", renormalize=False),
    RouterConfig(3, zero_experts=2, renormalize=False),
    RouterConfig(2, choice="logits", renormalize=False, gate_bias=True),
    RouterConfig(3, expert_scale=True),
    RouterConfig(2, norm_eps=1e-6),
    RouterConfig(2, choice="hash", scoring="sqrtsoftplus", vocabulary=11),
)
ACTIVATIONS = (
    Activation("silu"),
    Activation("silu", limit=1.5, alpha=1.7, beta=1.0),
    Activation("gelu_tanh"),
    Activation("relu2", gated=False),
    Activation("swiglustep", limit=2.0),
)
SHARED = (None, SharedConfig(16), SharedConfig(9, gated=True, scale=0.5))
FUSIBLE = (1, 2)
"""Shared experts that can be slots of the routed product are so many routed ones wide."""
ORDERS = [order for order in SharedOrder if order is not SharedOrder.SIDE_STREAM]


@pytest.fixture(scope="module")
def grids(comm: "Intracomm") -> list[ProcessGrid]:
    """Each shape once: MPI has a limited number of communicators."""
    world = World.attach(comm)
    n = world.size
    axes: list[dict[str, int]] = [{}, {"ep": 1}]
    axes += [{"tp": n}, {"etp": n}, {"tp": n, "ep": 1}, {"tp": n, "ep": 1, "etp": n}] if n > 1 else []
    axes += (
        [{"tp": 2}, {"tp": 2, "ep": 2, "etp": 2}, {"tp": 2, "ep": 2}, {"dp": 1, "ep": 2}] if n == 4 else []
    )
    return [ProcessGrid.create(world, **a) for a in axes]


def fitting(grid: ProcessGrid, sequence_parallel: bool) -> list[str]:
    """The dispatchers that work in every expert group of ``grid``; collective."""
    placement = Placement.blocks(8, grid.shape.ep, grid.shape.etp)

    def works(name: str) -> bool:
        try:
            choose_dispatcher(grid, placement, name, sequence_parallel=sequence_parallel)
        except ValueError:
            return False
        return True

    names = [cls.name for cls in DISPATCHERS if works(cls.name)]
    everyones = grid.world.comm.all_gather_object(names)
    return ["auto", *(n for n in names if all(n in theirs for theirs in everyones))]


def layer_of(draw: Any) -> LayerConfig:
    """Any layer that there can be."""
    router = draw(st.sampled_from(ROUTERS), label="router")
    width = draw(st.integers(4, 20), label="width")
    # What is H wide and not the tokens' own cannot be added on the latent side.
    beside = draw(st.sampled_from(["nothing", "latent", "output bias"]), label="beside")
    normed = router.norm_eps is not None
    latent = 16 if beside == "latent" and router.zero_experts == 0 and not normed else None
    fusible = [SharedConfig(n * width, gated=n > 1) for n in FUSIBLE]
    return LayerConfig(
        draw(st.sampled_from([4, 6])) if router.num_expert_group > 1 else draw(st.integers(5, 9)),
        HIDDEN,
        width,
        router,
        activation=draw(st.sampled_from(ACTIVATIONS)),
        shared=None if normed else draw(st.sampled_from([*SHARED, *fusible]), label="shared"),
        bias=draw(st.booleans(), label="bias"),
        output_bias=beside == "output bias",
        latent_size=latent,
    )


def fuses(config: LayerConfig, grid: ProcessGrid, dispatcher: str) -> bool:
    """Whether the shared experts can be slots of the routed product."""
    try:
        count_shared_slots(config)
    except ValueError:
        return False
    replicated = grid.moe.size == 1 or (dispatcher == "replicated")
    return grid.shape.etp == 1 or replicated


@settings(max_examples=80)
@given(data=st.data())
def test_equals_the_reference(grids: list[ProcessGrid], data: st.DataObject) -> None:
    draw = data.draw
    config = layer_of(draw)
    grid = draw(st.sampled_from(grids), label="grid")
    parallel = draw(st.booleans(), label="sequence parallel")
    dispatcher = draw(st.sampled_from(fitting(grid, parallel)), label="dispatcher")
    fuse = fuses(config, grid, dispatcher) and draw(st.booleans(), label="fuse")
    options = LayerOptions(
        dispatcher,
        exact=grid.shape.etp == 1 and config.router.norm_eps is None and draw(st.booleans(), label="exact"),
        sequence_parallel=parallel,
        shared_order=SharedOrder.AUTO if fuse else draw(st.sampled_from(ORDERS), label="order"),
        fuse_shared_experts=fuse,
        depth=draw(st.sampled_from(["auto", "steps"]), label="depth"),
    )
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16]))
    layer = SyntheticLayer(config, dtype, draw(st.integers(0, 10**6), label="seed"))
    runner = build_layer(config, grid, dtype, layer.read, options)
    holders = grid.world.size if parallel else grid.dp.size
    counts = draw(st.lists(st.integers(0, 7), min_size=holders, max_size=holders), label="tokens")
    me = grid.world.rank if parallel else grid.dp.rank
    generator = torch.Generator().manual_seed(layer.seed + me)
    x = torch.randn(counts[me], HIDDEN, generator=generator).to(dtype)
    ids = torch.randint(max(1, config.router.vocabulary), (counts[me],), generator=generator)
    expected, _ = layer.reference(x, ids)
    ways = [runner, lambda *given: to_full(runner.forward_deferred(*given)).tensor]
    pipelined = grid.world.comm.all_gather_object(runner.dispatcher.capabilities.pipelined)
    if draw(st.booleans(), label="in parts") and all(pipelined):  # expert groups may have other dispatchers
        ways.append(MicroBatches(runner, 2))
    for way in ways:
        got = way(x, None, ids)
        assert got.shape == x.shape and got.dtype == dtype
        if not len(x):
            continue
        per_token = (got.float() - expected).norm(dim=1) / expected.norm(dim=1).clamp_min(1e-3)
        # In bf16 two logits may round to one another's order: judge by the typical token.
        assert per_token.max() < 1e-4 if dtype == torch.float32 else per_token.median() < 3e-2
