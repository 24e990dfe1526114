"""Building a layer's runner from a checkpoint: placement, kernel, weights; agreed by all ranks before any work."""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from xpar.comm.dispatch.auto import DispatcherChoice, choose_dispatcher
from xpar.comm.failure import agreed
from xpar.comm.grid import ProcessGrid
from xpar.comm.placement import Placement
from xpar.comm.reduction import Full, Partial, State
from xpar.comm.shares import share
from xpar.engine.architectures import find, layer_config, moe_layers
from xpar.engine.checkpoint import Checkpoint, CheckpointError
from xpar.engine.config import LayerConfig
from xpar.engine.latent import LatentSpace
from xpar.engine.overlap import SharedOrder
from xpar.engine.runner import MoERunner
from xpar.engine.shared import SharedExperts
from xpar.engine.weights import LayerWeights, SharedWeights, load_layer, make_router
from xpar.kernels.contracts import ExpertKernel, ExpertSpec
from xpar.kernels.gpu.available import use_table
from xpar.kernels.registry import Choice, choose

log = logging.getLogger("xpar.build")
FLOATS = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True)
class LayerOptions:
    """How a layer is computed: names of a dispatcher and a kernel or auto, and :class:`MoERunner`'s own options.

    ``tiles``: a file of tile shapes that ``xpar tune`` wrote.
    """

    dispatcher: str = "auto"
    kernel: str = "auto"
    exact: bool = False
    sequence_parallel: bool = False
    shared_order: SharedOrder = SharedOrder.AUTO
    tiles: Path | None = None


DEFAULT = LayerOptions()


def load_runner(
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
        config = config_of(checkpoint, layer)
        read = partial(load_layer, checkpoint, find(checkpoint.config), layer, config)
        begin = time.perf_counter()
        runner = assemble(config, grid, dtype or checkpoint.dtype, read, options, layer)
        log.info(
            "layer %d: experts %s in %s, %.1f MB read in %.2f s",
            layer,
            runner.experts_here(),
            runner.kernel.name if runner.kernel else "no kernel",
            checkpoint.bytes_read / 1e6,
            time.perf_counter() - begin,
        )
        return runner


def assemble(
    config: LayerConfig,
    grid: ProcessGrid,
    dtype: torch.dtype,
    read: Callable[..., LayerWeights],
    options: LayerOptions = DEFAULT,
    layer: int = 0,
) -> MoERunner:
    """A runner whose weights come from ``read``, which takes the keyword arguments of :func:`load_layer`."""
    exact, sequence_parallel = options.exact, options.sequence_parallel
    check_exact(exact, grid)
    placement, chosen = pick_dispatcher(grid, config, options.dispatcher, sequence_parallel)
    experts = placement.experts_of(grid.moe.rank // grid.shape.etp)
    rows = slice_of("expert width", config.intermediate_size, grid.etp.size, grid.etp.rank)
    local = None
    if experts:
        spec = spec_of(config, grid.device, len(experts), rows.stop - rows.start, dtype, exact)
        local = choose(spec, options.kernel).record.build(spec)
        if options.tiles is not None:
            use_table(local, options.tiles)
    # Under sequence parallel each rank has tokens of its own, and with them a whole copy of the shared experts.
    slices = 1 if exact or sequence_parallel else grid.tp.size
    weights = read(
        experts=experts,
        sink=_no_expert if local is None else local.load_expert,
        dtype=dtype,
        rows=rows,
        shared_rows=_shared_rows(config, grid, slices),
    )
    weights = weights.to(grid.device)
    shared = None if weights.shared is None else _shared(config, grid, weights.shared, dtype, exact, slices)
    on_host = grid.device.type == "cpu"
    # Looking at every logit would make the host wait for the GPU in every layer.
    router = make_router(weights.router, config, row_invariant=exact, check_finite=on_host)
    return MoERunner(
        config,
        grid,
        router,
        chosen.dispatcher,
        local,
        shared,
        dtype=dtype,
        exact=exact,
        sequence_parallel=sequence_parallel,
        shared_order=options.shared_order,
        layer=layer,
        output_bias=weights.output_bias,
        latent=None
        if weights.latent is None
        else LatentSpace(weights.latent.enter, weights.latent.leave, exact),
    )


def config_of(checkpoint: Checkpoint, layer: int) -> LayerConfig:
    """The configuration of MoE layer ``layer``; raises CheckpointError if that layer is not one."""
    arch = find(checkpoint.config)
    layers = moe_layers(arch, checkpoint.config)
    if layer not in layers:
        raise CheckpointError(
            f"layer {layer} has no experts; the MoE layers are {', '.join(map(str, layers))}"
        )
    return layer_config(arch, checkpoint.config, layer)


def pick_dispatcher(
    grid: ProcessGrid, config: LayerConfig, name: str, sequence_parallel: bool = False
) -> tuple[Placement, DispatcherChoice]:
    """Where the experts live, and how tokens get there."""
    placement = Placement.blocks(config.num_experts, grid.shape.ep, grid.shape.etp).to(grid.device)
    return placement, choose_dispatcher(
        grid, placement, name, top_k=config.router.top_k, sequence_parallel=sequence_parallel
    )


def pick_kernel(
    config: LayerConfig, grid: ProcessGrid, experts: int, dtype: torch.dtype, name: str, exact: bool
) -> Choice:
    """The kernel for ``experts`` of this rank's slices, with the reasons against the others."""
    rows = slice_of("expert width", config.intermediate_size, grid.etp.size, grid.etp.rank)
    width = rows.stop - rows.start
    return choose(spec_of(config, grid.device, experts, width, dtype, exact), name)


def spec_of(
    config: LayerConfig,
    device: torch.device,
    experts: int,
    width: int,
    dtype: torch.dtype,
    exact: bool,
) -> ExpertSpec:
    """What a kernel must be able to do for ``experts`` routed experts that are ``width`` wide on this rank."""
    return ExpertSpec(
        num_experts=experts,
        hidden_size=config.routed_size,
        intermediate_size=width,
        dtype=dtype,
        activation=config.activation,
        device=str(device),
        row_invariant=exact,
        bias=config.bias,
    )


def check_exact(exact: bool, grid: ProcessGrid) -> None:
    """Slicing an expert's width changes the order of its sums, which exact mode promises not to do."""
    if exact and grid.shape.etp > 1:
        raise ValueError(
            f"exact mode with etp={grid.shape.etp}: a sliced expert sums in another order; use etp=1"
        )


def slice_of(what: str, width: int, parts: int, part: int) -> slice:
    """This rank's part of ``width``; parts may differ by one."""
    if width < parts:
        raise ValueError(f"{what} {width} cannot be sliced over {parts} ranks; use at most {width}")
    return share(width, parts, part)


def _shared_rows(config: LayerConfig, grid: ProcessGrid, slices: int) -> slice:
    if config.shared is None or slices == 1:
        return slice(None)
    return slice_of("shared expert width", config.shared.intermediate_size, slices, grid.tp.rank)


def _shared(
    config: LayerConfig,
    grid: ProcessGrid,
    weights: SharedWeights,
    dtype: torch.dtype,
    exact: bool,
    slices: int,
) -> SharedExperts:
    routed = spec_of(config, grid.device, 1, weights.down.shape[1], dtype, exact)
    spec = replace(routed, hidden_size=config.hidden_size, bias=False)
    kernel: ExpertKernel = choose(spec).record.build(spec)
    kernel.load_expert(0, weights.gate_up, weights.down)
    state: State = Full() if slices == 1 else Partial(grid.tp)
    scale = 1.0 if config.shared is None else config.shared.scale
    return SharedExperts(kernel, state, weights.gate, scale)


def _no_expert(index: int, *tensors: torch.Tensor) -> None:
    raise AssertionError(f"expert {index} came to a rank that holds none")
