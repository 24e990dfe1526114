"""What a rank holds of a layer's routed experts: the dispatcher that reaches them, and the kernel that computes them."""

from dataclasses import dataclass

import torch

from xpar.comm.dispatch.base import Dispatcher
from xpar.comm.dispatch.choose import DispatcherChoice, choose_dispatcher
from xpar.comm.grid import ProcessGrid
from xpar.comm.partition import split_range
from xpar.comm.placement import Placement
from xpar.engine.config import LayerConfig
from xpar.kernels.choice import Choice
from xpar.kernels.contracts import ExpertKernel, ExpertSpec
from xpar.kernels.registry import KernelEntry, choose_kernel


@dataclass(frozen=True)
class ExpertOptions:
    """How experts are computed: names of a dispatcher and of a kernel or auto, and ``exact`` as for :class:`MoERunner`."""

    dispatcher: str = "auto"
    kernel: str = "auto"
    exact: bool = False


@dataclass(frozen=True)
class ExpertShard:
    """This rank's part of a layer: ``kernel`` for global ids ``experts``, ``rows`` of their width; None without any.

    Copies that every ep rank holds come after ``experts`` in the kernel.
    """

    dispatcher: Dispatcher
    experts: range
    rows: slice
    kernel: ExpertKernel | None
    record: KernelEntry | None


def build_expert_shard(
    config: LayerConfig,
    grid: ProcessGrid,
    dtype: torch.dtype,
    options: ExpertOptions,
    sequence_parallel: bool = False,
    copies: int = 0,
) -> ExpertShard:
    """The dispatcher, and a kernel that has not been given its experts yet. Holds no collective.

    ``copies``: experts of the same width that every ep rank holds besides its own. Raises ValueError for options that do not fit the grid, the layer or this machine.
    """
    check_exact(options.exact, grid)
    placement, chosen = pick_dispatcher(grid, config, options.dispatcher, sequence_parallel, copies)
    experts = placement.experts_of(grid.moe.rank // grid.shape.etp)
    rows = width_slice("expert width", config.intermediate_size, grid.etp.size, grid.etp.rank)
    kernel = record = None
    if count := len(experts) + copies:
        spec = expert_spec(config, grid.device, count, rows.stop - rows.start, dtype, options.exact)
        record = choose_kernel(spec, options.kernel).chosen
        kernel = record.build(spec)
    return ExpertShard(chosen.dispatcher, experts, rows, kernel, record)


def pick_dispatcher(
    grid: ProcessGrid, config: LayerConfig, name: str, sequence_parallel: bool = False, copies: int = 0
) -> tuple[Placement, DispatcherChoice]:
    """Where the experts live, and how tokens get there. ``copies``: experts that every ep rank holds besides its own."""
    placement = Placement.blocks(config.num_experts, grid.shape.ep, grid.shape.etp, copies).to(grid.device)
    return placement, choose_dispatcher(
        grid, placement, name, top_k=config.router.top_k, sequence_parallel=sequence_parallel
    )


def pick_kernel(
    config: LayerConfig, grid: ProcessGrid, experts: int, dtype: torch.dtype, name: str, exact: bool
) -> Choice[KernelEntry]:
    """The kernel for ``experts`` of this rank's slices, with the reasons against the others."""
    rows = width_slice("expert width", config.intermediate_size, grid.etp.size, grid.etp.rank)
    width = rows.stop - rows.start
    return choose_kernel(expert_spec(config, grid.device, experts, width, dtype, exact), name)


def expert_spec(
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


def width_slice(what: str, width: int, parts: int, part: int) -> slice:
    """This rank's part of ``width``; parts may differ by one."""
    if width < parts:
        raise ValueError(f"{what} {width} cannot be sliced over {parts} ranks; use at most {width}")
    return split_range(width, parts, part)
