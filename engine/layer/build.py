"""Building a layer's runner from a checkpoint: placement, kernel, weights; agreed by all ranks before any work."""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from xpar.comm.failure import agreed
from xpar.comm.grid import ProcessGrid
from xpar.comm.reduction import Full, Partial, State
from xpar.engine.architectures.layer_config import find, layer_config, moe_layers
from xpar.engine.architectures.layer_weights import (
    LayerWeights,
    SharedWeights,
    load_layer_weights,
    make_router,
)
from xpar.engine.checkpoint.reader import Checkpoint, CheckpointError
from xpar.engine.config import LayerConfig
from xpar.engine.layer.expert_shard import (
    ExpertOptions,
    ExpertShard,
    build_expert_shard,
    expert_spec,
    width_slice,
)
from xpar.engine.layer.fused_shared_experts import (
    SharedSlots,
    build_shared_slots,
    check_fusable,
    experts_of_shared,
    home_rank,
)
from xpar.engine.layer.latent import ExpertInputProjection, LatentProjection, NormProjection
from xpar.engine.layer.route_and_compute import (
    DEPTHS,
    Depth,
    RouteAndCompute,
    build_route_and_compute,
    why_not_fused,
)
from xpar.engine.layer.runner import MoERunner
from xpar.engine.layer.shared_expert_overlap import SharedOrder
from xpar.engine.layer.shared_experts import SharedExperts
from xpar.engine.layer.token_split import KeepAllTokens, choose_token_split
from xpar.engine.routing.router import Router
from xpar.kernels.contracts import ExpertKernel
from xpar.kernels.gpu.availability import use_table
from xpar.kernels.registry import choose_kernel

log = logging.getLogger("xpar.build")
FLOATS = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True)
class LayerOptions(ExpertOptions):
    """How a whole layer is computed: :class:`MoERunner`'s own options.

    ``tiles``: a file that ``xpar tune`` wrote. ``fuse_shared_experts``: compute them as slots of the routed product.
    ``depth``: whether a kernel may cover more steps than its own, see :mod:`xpar.engine.layer.route_and_compute`.
    """

    sequence_parallel: bool = False
    shared_order: SharedOrder = SharedOrder.AUTO
    tiles: Path | None = None
    fuse_shared_experts: bool = False
    depth: Depth = "auto"


DEFAULT = LayerOptions()


def load_layer(
    path: str | Path,
    layer: int,
    grid: ProcessGrid,
    dtype: torch.dtype | None = None,
    options: LayerOptions = DEFAULT,
) -> MoERunner:
    """See :meth:`MoERunner.from_checkpoint`."""
    return agreed(grid.world.comm, lambda: _load(path, layer, grid, dtype, options))


def _load(
    path: str | Path, layer: int, grid: ProcessGrid, dtype: torch.dtype | None, options: LayerOptions
) -> MoERunner:
    with Checkpoint(Path(path)) as checkpoint:
        config = read_layer_config(checkpoint, layer)
        read = partial(load_layer_weights, checkpoint, find(checkpoint.config), layer, config)
        begin = time.perf_counter()
        runner = build_layer(config, grid, dtype or checkpoint.dtype, read, options, layer)
        log.info(
            "layer %d: experts %s in %s, %.1f MB read in %.2f s",
            layer,
            runner.experts_here(),
            runner.kernel.name if runner.kernel else "no kernel",
            checkpoint.bytes_read / 1e6,
            time.perf_counter() - begin,
        )
        return runner


def build_layer(
    config: LayerConfig,
    grid: ProcessGrid,
    dtype: torch.dtype,
    read: Callable[..., LayerWeights],
    options: LayerOptions = DEFAULT,
    layer: int = 0,
) -> MoERunner:
    """A runner whose weights come from ``read``, which takes the keyword arguments of :func:`load_layer_weights`."""
    exact, sequence_parallel = options.exact, options.sequence_parallel
    slots = _shared_slots(config, options)
    held = build_expert_shard(config, grid, dtype, options, sequence_parallel, slots)
    if held.kernel is not None and options.tiles is not None:
        use_table(held.kernel, options.tiles)
    # Under sequence parallel each rank has tokens of its own, and with them a whole copy of the shared experts.
    slices = 1 if exact or sequence_parallel or slots else grid.tp.size
    weights = read(
        experts=held.experts,
        sink=_no_expert if held.kernel is None else held.kernel.load_expert,
        dtype=dtype,
        rows=held.rows,
        shared_rows=_shared_rows(config, grid, slices),
    )
    weights = weights.to(grid.device)
    shared = fused = None
    if weights.shared is not None and slots:
        fused = _fused(config, held, weights.shared, slots, exact)
    elif weights.shared is not None:
        shared = _shared(config, grid, weights.shared, dtype, exact, slices)
    on_host = grid.device.type == "cpu"
    # Looking at every logit would make the host wait for the GPU in every layer.
    router = make_router(
        weights.router,
        config,
        row_invariant=exact,
        check_finite=on_host,
        shared_gate=_gate_beside_router(grid, held, weights.shared, options),
    )
    return MoERunner(
        config,
        grid,
        router,
        held.dispatcher,
        held.kernel,
        shared,
        fused,
        _one_call(config, held, router, options),
        dtype=dtype,
        exact=exact,
        sequence_parallel=sequence_parallel,
        shared_order=options.shared_order,
        layer=layer,
        output_bias=weights.output_bias,
        latent=_input_space(config, weights, exact),
    )


def _input_space(config: LayerConfig, weights: LayerWeights, exact: bool) -> ExpertInputProjection | None:
    """Where the routed experts compute, if not on the layer's tokens."""
    if weights.norm is not None and config.router.norm_eps is not None:
        if exact:
            raise ValueError(
                "exact mode with norms inside the layer: a row's sum of squares may depend on the rest of the batch; "
                "leave exact out"
            )
        return NormProjection(weights.norm.scale, config.router.norm_eps)
    return (
        None
        if weights.latent is None
        else LatentProjection(weights.latent.enter, weights.latent.leave, exact)
    )


def read_layer_config(checkpoint: Checkpoint, layer: int) -> LayerConfig:
    """The configuration of MoE layer ``layer``; raises CheckpointError if that layer is not one."""
    arch = find(checkpoint.config)
    layers = moe_layers(arch, checkpoint.config)
    if layer not in layers:
        raise CheckpointError(
            f"layer {layer} has no experts; the MoE layers are {', '.join(map(str, layers))}"
        )
    return layer_config(arch, checkpoint.config, layer)


def _shared_rows(config: LayerConfig, grid: ProcessGrid, slices: int) -> slice:
    if config.shared is None or slices == 1:
        return slice(None)
    return width_slice("shared expert width", config.shared.intermediate_size, slices, grid.tp.rank)


def _shared(
    config: LayerConfig,
    grid: ProcessGrid,
    weights: SharedWeights,
    dtype: torch.dtype,
    exact: bool,
    slices: int,
) -> SharedExperts:
    routed = expert_spec(config, grid.device, 1, weights.down.shape[1], dtype, exact)
    spec = replace(routed, hidden_size=config.hidden_size, bias=False)
    kernel: ExpertKernel = choose_kernel(spec).chosen.build(spec)
    kernel.load_expert(0, weights.gate_up, weights.down)
    state: State = Full() if slices == 1 else Partial(grid.tp)
    scale = 1.0 if config.shared is None else config.shared.scale
    return SharedExperts(kernel, state, weights.gate, scale)


def _shared_slots(config: LayerConfig, options: LayerOptions) -> int:
    """Slots that the shared experts take in the routed product: none unless asked for."""
    if not options.fuse_shared_experts:
        return 0
    if options.shared_order is not SharedOrder.AUTO:
        raise ValueError(
            f"fuse_shared_experts with shared_order={options.shared_order.value!r}: fused ones have no order of their "
            "own, they compute with the routed experts; leave it at auto"
        )
    return build_shared_slots(config)


def _fused(
    config: LayerConfig, held: ExpertShard, weights: SharedWeights, count: int, exact: bool
) -> SharedSlots:
    """Gives the kernel its copies of the shared experts, each as wide as a routed one."""
    assert config.shared is not None and held.kernel is not None  # there are slots to compute
    placement = held.dispatcher.placement
    check_fusable(held.dispatcher, placement.etp)
    parts = experts_of_shared(weights, config.activation.gated, config.intermediate_size, held.rows)
    for index, (gate_up, down) in enumerate(parts):
        held.kernel.load_expert(len(held.experts) + index, gate_up, down)
    home, scale = home_rank(held.dispatcher), config.shared.scale
    return SharedSlots(placement.num_experts, count, placement.ep, home, weights.gate, scale, exact)


def _one_call(
    config: LayerConfig, held: ExpertShard, router: Router, options: LayerOptions
) -> RouteAndCompute | None:
    if options.depth not in DEPTHS:
        raise ValueError(f"depth={options.depth!r}: choose one of {', '.join(DEPTHS)}")
    why = why_not_fused(
        config, held.record, held.dispatcher, exact=options.exact, fused=options.fuse_shared_experts
    )
    if options.depth == "one-call" and why is not None:
        raise ValueError(f"depth='one-call': {why}; choose auto")
    if options.depth == "steps" or why is not None or held.kernel is None or held.record is None:
        return None
    return build_route_and_compute(held.kernel, router, held.record, options.depth)


def _gate_beside_router(
    grid: ProcessGrid, held: ExpertShard, shared: SharedWeights | None, options: LayerOptions
) -> Tensor | None:
    """The shared experts' gate, if one product with the router's serves the same tokens; None where it cannot.

    In exact mode the logits would depend on whether it can, and so on the grid.
    """
    if shared is None or options.exact:
        return None
    tokens = choose_token_split(grid, held.dispatcher, options.sequence_parallel)
    return shared.gate if options.fuse_shared_experts or isinstance(tokens, KeepAllTokens) else None


def _no_expert(index: int, *tensors: torch.Tensor) -> None:
    raise AssertionError(f"expert {index} came to a rank that holds none")
