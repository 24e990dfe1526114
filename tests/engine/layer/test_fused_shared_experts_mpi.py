"""Shared experts as slots of the routed product: the same output, each counted once, and no row travels for
them."""

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor

from xpar.comm import ProcessGrid, World
from xpar.comm.reduction import to_full
from xpar.engine.config import LayerConfig, RouterConfig, SharedConfig
from xpar.engine.layer import shared_experts
from xpar.engine.layer.build import build_layer
from xpar.engine.layer.observers import Observers
from xpar.engine.layer.options import LayerOptions
from xpar.engine.layer.residual_scaling import scale_layer_output
from xpar.engine.layer.runner import MoERunner
from xpar.engine.layer.shared_expert_overlap import SharedOrder
from xpar.engine.layer.stage_timer import MeasuringTimer
from xpar.engine.routing.router import FusedGateRouter
from xpar.engine.synthetic.layer import SyntheticLayer

if TYPE_CHECKING:
    from mpi4py.MPI import Intracomm

pytestmark = pytest.mark.mpi(deadline=120)
HIDDEN, WIDTH = 32, 12
TOKENS = (7, 4, 0, 5)
PLAIN = LayerConfig(3, HIDDEN, WIDTH, RouterConfig(2), shared=SharedConfig(WIDTH))
LAYERS = {
    "one": PLAIN,
    "two, gated": replace(PLAIN, num_experts=6, shared=SharedConfig(2 * WIDTH, gated=True, scale=0.5)),
    "over the scaling factor": scale_layer_output(
        replace(PLAIN, router=RouterConfig(2, routed_scaling_factor=4.0), shared=SharedConfig(3 * WIDTH))
    )[0],
    "identity experts": replace(PLAIN, router=RouterConfig(3, zero_experts=2, renormalize=False)),
}
# Three experts over up to four ranks: the last of them holds nothing but its copy of the shared ones.
WAYS: dict[str, tuple[dict[str, int], dict[str, Any]]] = {
    "alltoall": ({}, {"dispatcher": "alltoall"}),
    "allgather, exact": ({}, {"dispatcher": "allgather", "exact": True}),
    "shared memory": ({}, {"dispatcher": "shared-memory"}),
    "replicated": ({"tp": -1}, {"dispatcher": "replicated"}),
    "replicated, exact": ({"tp": -1}, {"dispatcher": "replicated", "exact": True}),
    "sliced": ({"tp": -1, "ep": 1, "etp": -1}, {"dispatcher": "replicated"}),
    "shared out": ({"tp": -1}, {"dispatcher": "alltoall"}),
    "sequence parallel": ({"tp": -1}, {"dispatcher": "alltoall", "sequence_parallel": True}),
    "alone": ({"ep": 1}, {}),
}


@pytest.fixture(scope="module")
def world(comm: "Intracomm") -> World:
    return World.attach(comm)


@pytest.fixture(scope="module")
def grids(world: World) -> dict[str, ProcessGrid]:
    def axes(wanted: dict[str, int]) -> dict[str, int]:
        return {name: world.size if n < 0 else n for name, n in wanted.items()}

    return {name: ProcessGrid.create(world, **axes(wanted)) for name, (wanted, _) in WAYS.items()}


def tokens(runner: MoERunner, seed: int, sequence_parallel: bool = False) -> Tensor:
    """Those of this rank: alike within a tp group unless sequence parallel."""
    grid = runner.grid
    me = grid.world.rank if sequence_parallel else grid.dp.rank
    return torch.randn(TOKENS[me], HIDDEN, generator=torch.Generator().manual_seed(seed + me))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", LAYERS)
def test_equals_the_reference_and_moves_no_row_more(
    grids: dict[str, ProcessGrid], fresh_seed: int, kind: str, way: str
) -> None:
    config, (_, given) = LAYERS[kind], WAYS[way]
    layer = SyntheticLayer(config, torch.float32, fresh_seed)
    fused, beside = (
        build_layer(
            config, grids[way], torch.float32, layer.read, LayerOptions(**given, fuse_shared_experts=f)
        )
        for f in (True, False)
    )
    x = tokens(fused, fresh_seed, given.get("sequence_parallel", False))
    expected = layer.reference(x)[0]
    assert fused.shared is None
    counters = [runner.make_load_counter() for runner in (fused, beside)]
    outputs = [
        runner(x, observers=Observers(load=counter))
        for runner, counter in zip((fused, beside), counters, strict=True)
    ]
    for output in (*outputs, to_full(fused.forward_deferred(x)).tensor):
        torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)
    ours, theirs = (counter.read() for counter in counters)
    # The router's choices are counted, and its tokens travel; the shared slots are neither.
    assert (ours.per_expert, ours.remote_rows) == (theirs.per_expert, theirs.remote_rows)


@pytest.mark.parametrize("kind", ["one", "two, gated"])
def test_exact_bits_do_not_depend_on_the_grid(
    grids: dict[str, ProcessGrid], fresh_seed: int, kind: str
) -> None:
    layer = SyntheticLayer(LAYERS[kind], torch.bfloat16, fresh_seed)
    options = LayerOptions(exact=True, fuse_shared_experts=True)
    ways = ("alone", "alltoall", "replicated", "shared out")
    outputs = []
    for way in ways:
        named = replace(options, dispatcher=WAYS[way][1].get("dispatcher", "auto"))
        runner = build_layer(layer.config, grids[way], torch.bfloat16, layer.read, named)
        x = torch.randn(9, HIDDEN, generator=torch.Generator().manual_seed(fresh_seed)).bfloat16()
        outputs.append(runner(x))
    assert all(torch.equal(output, outputs[0]) for output in outputs)


def test_a_token_is_computed_where_it_is(grids: dict[str, ProcessGrid]) -> None:
    layer = SyntheticLayer(PLAIN, torch.float32, 0)
    options = LayerOptions("alltoall", fuse_shared_experts=True)
    runner = build_layer(PLAIN, grids["alltoall"], torch.float32, layer.read, options)
    x, clock = tokens(runner, 0), MeasuringTimer()
    routing = runner.run(x, observers=Observers(clock, clock)).routing
    assert routing.topk_ids.shape[1] == PLAIN.router.top_k
    computed = runner.grid.world.comm.all_gather_object(clock.read().slots)
    total = sum(TOKENS[: runner.grid.world.size])
    assert sum(computed) == total * (PLAIN.router.top_k + 1)


@pytest.mark.parametrize("fuse", [False, True], ids=["beside", "fused"])
def test_both_gates_are_one_product(
    grids: dict[str, ProcessGrid], fresh_seed: int, monkeypatch: pytest.MonkeyPatch, fuse: bool
) -> None:
    config = LAYERS["two, gated"]
    layer = SyntheticLayer(config, torch.float32, fresh_seed)
    options = LayerOptions("alltoall", fuse_shared_experts=fuse)
    runner = build_layer(config, grids["alltoall"], torch.float32, layer.read, options)
    assert isinstance(runner.router, FusedGateRouter)
    x = tokens(runner, fresh_seed)
    expected = layer.reference(x)[0]
    with monkeypatch.context() as patched:
        patched.setattr(
            shared_experts, "gate_logits", None
        )  # nobody makes the shared experts' logits by themselves
        torch.testing.assert_close(runner(x), expected, rtol=1e-4, atol=1e-5)
    # A caller who brings the router's logits brings no others.
    logits = runner.router.logits(x)
    torch.testing.assert_close(runner(x, logits), expected, rtol=1e-4, atol=1e-5)


def test_where_ranks_share_tokens_out_each_gate_has_tokens_of_its_own(grids: dict[str, ProcessGrid]) -> None:
    config = LAYERS["two, gated"]
    layer = SyntheticLayer(config, torch.float32, 0)
    for way, options in (("shared out", LayerOptions("alltoall")), ("alone", LayerOptions(exact=True))):
        runner = build_layer(config, grids[way], torch.float32, layer.read, options)
        one_rank = runner.grid.world.size == 1 and not options.exact
        assert isinstance(runner.router, FusedGateRouter) == one_rank


REFUSED: dict[str, tuple[LayerConfig, LayerOptions, str]] = {
    "none": (replace(PLAIN, shared=None), LayerOptions(), "the layer has no shared experts"),
    "width": (
        replace(PLAIN, shared=SharedConfig(WIDTH + 1)),
        LayerOptions(),
        f"they are {WIDTH + 1} wide, no multiple of the routed experts' {WIDTH}",
    ),
    "latent": (replace(PLAIN, latent_size=16), LayerOptions(), "a latent size of 16"),
    "input": (
        replace(PLAIN, router=RouterConfig(1, weight_on_input=True)),
        LayerOptions(),
        "weight multiplies the tokens",
    ),
    "bias": (replace(PLAIN, bias=True), LayerOptions(), "the routed experts have biases"),
    "order": (PLAIN, LayerOptions(shared_order=SharedOrder.BEFORE), "with shared_order='before'"),
}


@pytest.mark.parametrize("config, options, message", REFUSED.values(), ids=REFUSED.keys())
def test_what_cannot_be_fused(
    grids: dict[str, ProcessGrid], config: LayerConfig, options: LayerOptions, message: str
) -> None:
    layer = SyntheticLayer(config, torch.float32, 0)
    fused = replace(options, fuse_shared_experts=True)
    with pytest.raises(ValueError, match=f"fuse_shared_experts.*{message}"):
        build_layer(config, grids["alone"], torch.float32, layer.read, fused)


@pytest.mark.mpi(min_size=2)
def test_slices_on_other_ranks_are_refused_where_tokens_would_travel(world: World) -> None:
    layer = SyntheticLayer(PLAIN, torch.float32, 0)
    grid = ProcessGrid.create(world, ep=1, etp=world.size)
    with pytest.raises(
        ValueError, match=f"with etp={world.size} and the dispatcher alltoall: every token would travel"
    ):
        build_layer(
            PLAIN, grid, torch.float32, layer.read, LayerOptions("alltoall", fuse_shared_experts=True)
        )


def test_fused_outputs_are_one_sum(grids: dict[str, ProcessGrid]) -> None:
    layer = SyntheticLayer(PLAIN, torch.float32, 0)
    options = LayerOptions(fuse_shared_experts=True)
    runner = build_layer(PLAIN, grids["alone"], torch.float32, layer.read, options)
    with pytest.raises(ValueError, match="forward_separately with fused shared experts"):
        runner.forward_separately(torch.zeros(2, HIDDEN))
