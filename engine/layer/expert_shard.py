"""The routed experts of one rank, with the dispatcher that reaches them and the kernel that computes them."""

import logging
import math
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor

from xpar.comm.communicator import Pending
from xpar.comm.dispatch.base import Dispatcher, DispatchPlan, SlotDispatcher
from xpar.comm.dispatch.choose import DispatcherChoice, choose_dispatcher
from xpar.comm.grid import ProcessGrid
from xpar.comm.partition import split_range
from xpar.comm.placement import Placement
from xpar.comm.reduction import Distributed
from xpar.engine.config import LayerConfig
from xpar.engine.layer.input_scheme import choose_input_scheme
from xpar.engine.layer.options import ExpertOptions
from xpar.kernels.choice import Choice
from xpar.kernels.contracts import ExpertInput, ExpertKernel, ExpertSpec, SlotKernel, Slots
from xpar.kernels.quantised_weight import ActivationScheme, WeightFormat
from xpar.kernels.registry import KernelEntry, choose_kernel, choose_quantised_kernel
from xpar.kernels.row_format import RowFormat
from xpar.kernels.rows import decoded, encode_rows

log = logging.getLogger("xpar.build")

UNEVEN = 1.1
"""The widest slice over the mean from which smaller blocks are better: ranks wait for the widest."""
LEAST_UNIT = 32
"""Rows and columns of the smallest block that is made for evenness; smaller ones cost kernels their speed."""


@dataclass(frozen=True)
class ExpertShard:
    """One rank's part of a layer's routed experts.

    Attributes:
        dispatcher: Moves tokens to the ranks of their experts, and outputs back.
        experts: Global ids of the experts that this rank holds. Copies of shared experts come after them in
            the kernel.
        width_slice: The part of every expert's width I that this rank holds.
        kernel: Computes the experts; None on a rank without any.
        kernel_entry: The entry of the kernel registry that made ``kernel``; None without a kernel.
        hidden_size: Width of the rows that the experts read and write.
        dtype: The dtype of these rows.
        exact: As in :class:`~xpar.engine.layer.options.ExpertOptions`.
        row_format: The form in which rows travel to experts; None for plain numbers. The same on every rank.
    """

    dispatcher: Dispatcher
    experts: range
    width_slice: slice
    kernel: ExpertKernel | None
    kernel_entry: KernelEntry | None
    hidden_size: int
    dtype: torch.dtype
    exact: bool
    row_format: RowFormat | None = None

    @property
    def row_bytes(self) -> int:
        """The bytes of a row on its way to experts."""
        plain = self.hidden_size * self.dtype.itemsize
        return plain if self.row_format is None else self.row_format.nbytes

    @property
    def takes_codes(self) -> bool:
        """Whether ``kernel`` quantises its inputs, and computes from rows that were quantised before."""
        return self.kernel is not None and self.kernel.spec.activation_scheme is not None

    @property
    def weight_format(self) -> WeightFormat | None:
        """The format that ``kernel`` computes from: its experts come to ``load_quantised``."""
        return None if self.kernel is None else self.kernel.spec.weight_format

    @property
    def kernel_name(self) -> str:
        """The kernel's name, or ``no kernel`` on a rank without experts."""
        return "no kernel" if self.kernel is None else self.kernel.name

    @property
    def expert_ids(self) -> str:
        """The global ids as text: ``4-7``, or ``none``."""
        return f"{self.experts.start}-{self.experts.stop - 1}" if self.experts else "none"

    def dispatch(self, rows: Tensor, plan: DispatchPlan) -> Pending[ExpertInput]:
        """Start to move ``rows`` [T, H] to their experts, quantised before that where the layer does so."""
        form = self.row_format
        if form is None or (self.dispatcher.capabilities.replicated_tokens and self.takes_codes):
            return self.dispatcher.dispatch(rows, plan)  # what does not move is quantised by the kernel
        moving = self.dispatcher.dispatch(encode_rows(rows, form), plan)
        return Pending(lambda: replace(moving.wait(), row_format=form))

    def compute(self, arrived: ExpertInput, plan: DispatchPlan) -> Tensor | Slots:
        """Compute the experts of the rows that arrived: ``[M, H]``, the slots of each row summed.

        In exact mode it is one row per slot, unsummed. A dispatcher that sums slots on their way home gets
        them where they lie.
        """
        if self.kernel is None:
            return self._no_rows(arrived)
        if not self.takes_codes:
            arrived = decoded(arrived, self.dtype)
        if self.dispatcher.capabilities.takes_slots and isinstance(self.kernel, SlotKernel):
            return self.kernel.compute_unsummed(arrived, self.exact)
        if self.exact:
            return self.kernel.compute_slots(arrived)
        out = self.dispatcher.output(plan, arrived.topk_ids.shape[0], self._no_rows(arrived))
        return self.kernel.compute(arrived, out)

    def _no_rows(self, arrived: ExpertInput) -> Tensor:
        return torch.empty(0, self.hidden_size, dtype=self.dtype, device=arrived.topk_ids.device)

    def combine(self, outputs: Tensor | Slots, plan: DispatchPlan) -> Pending[Distributed]:
        """Start to bring home what :meth:`compute` returned."""
        if isinstance(outputs, Slots):
            return cast(SlotDispatcher, self.dispatcher).combine_slots(outputs, plan)
        return self.dispatcher.combine(outputs, plan)


def build_expert_shard(
    config: LayerConfig,
    grid: ProcessGrid,
    dtype: torch.dtype,
    options: ExpertOptions,
    sequence_parallel: bool = False,
    copies: int = 0,
    weight_format: WeightFormat | None = None,
) -> ExpertShard:
    """Choose the dispatcher and the kernel of this rank's experts; the kernel has no weights yet.

    Makes no collective call. The caller loads each expert of ``ExpertShard.experts`` into the kernel.

    Args:
        config: The layer.
        grid: The process grid that the layer runs on.
        dtype: The dtype that the experts compute in.
        options: The caller's choices.
        sequence_parallel: The ranks of a tensor-parallel group give different tokens.
        copies: Experts of the same width that every expert-parallel rank holds beside its own.
        weight_format: The format in which the experts' weights are stored, or None for plain numbers. They
            are kept in it if :attr:`ExpertShard.weight_format` says so.

    Raises:
        ValueError: The options do not fit the grid, the layer or this machine.
    """
    check_exact(options.exact, grid)
    inputs = choose_input_scheme(config, grid.device, dtype, options.activations, options.exact)
    placement, chosen = pick_dispatcher(
        grid, config, dtype, options.dispatcher, sequence_parallel, copies, inputs.row_format
    )
    experts = placement.experts_of(grid.ep_rank)
    part = slice_expert_width(config, grid)
    kernel = entry = None
    if count := len(experts) + copies:
        spec = expert_spec(
            config, grid.device, count, part.stop - part.start, dtype, options.exact, inputs.scheme
        )
        spec, choice = choose_for_weights(spec, options.kernel, weight_format, bool(copies))
        entry = choice.chosen
        kernel = entry.build(spec)
    size, exact = config.routed_size, options.exact
    return ExpertShard(chosen.dispatcher, experts, part, kernel, entry, size, dtype, exact, inputs.row_format)


def pick_dispatcher(
    grid: ProcessGrid,
    config: LayerConfig,
    dtype: torch.dtype,
    name: str,
    sequence_parallel: bool = False,
    copies: int = 0,
    row_format: RowFormat | None = None,
) -> tuple[Placement, DispatcherChoice]:
    """Place the experts on the ranks and choose how tokens reach them, with the reasons against the others.

    The arguments are those of :func:`build_expert_shard`; ``name`` is a dispatcher's, or ``auto``, and
    ``row_format`` the form in which rows travel.
    """
    placement = Placement.blocks(config.num_experts, grid.shape.ep, grid.shape.etp, copies).to(grid.device)
    choice = choose_dispatcher(
        grid,
        placement,
        name,
        top_k=config.router.top_k,
        sequence_parallel=sequence_parallel,
        hidden_size=config.routed_size,
        dtype=dtype,
        coded_rows=row_format is not None,
    )
    choice.dispatcher.row_bytes = None if row_format is None else row_format.nbytes
    return placement, choice


def pick_kernel(
    config: LayerConfig,
    grid: ProcessGrid,
    experts: int,
    dtype: torch.dtype,
    name: str,
    exact: bool,
    weight_format: WeightFormat | None = None,
    scheme: ActivationScheme | None = None,
) -> Choice[KernelEntry]:
    """Choose the kernel for ``experts`` experts of this rank's width, with the reasons against the others.

    ``weight_format`` is the format in which the weights are stored, or None for plain numbers; ``scheme``
    that by which rows are quantised, or None.
    """
    part = slice_expert_width(config, grid)
    spec = expert_spec(config, grid.device, experts, part.stop - part.start, dtype, exact, scheme)
    return choose_for_weights(spec, name, weight_format)[1]


def choose_for_weights(
    spec: ExpertSpec, name: str, weight_format: WeightFormat | None, has_copies: bool = False
) -> tuple[ExpertSpec, Choice[KernelEntry]]:
    """Choose the kernel for experts whose weights are stored in ``weight_format``.

    If no kernel computes from that format, the weights are converted to ``spec.dtype`` when they are loaded,
    and one line of the log says what that costs.

    Args:
        spec: The requirements, with weights in plain numbers.
        name: A kernel's name, or ``auto``.
        weight_format: The format in which the weights are stored; None for plain numbers.
        has_copies: Copies of shared experts, in plain numbers, come into the same kernel.

    Returns:
        What the kernel has to be built for, and the choice with its reasons. Only a kernel that computes with
        quantised inputs is built with an activation scheme; any other gets rows as plain numbers.
    """
    plain = replace(spec, activation_scheme=None)
    if weight_format is None:
        return plain, choose_kernel(plain, name)
    if has_copies:
        spec, why = plain, "shared experts are fused with them"
        choice = choose_kernel(spec, name)
    else:
        spec, choice = choose_quantised_kernel(spec, weight_format, name)
        why = "no kernel computes from them" if name == "auto" else f"kernel {name} was asked for"
    if spec.weight_format is None:
        _log_conversion(spec, weight_format, choice.name, why)
    if spec.weight_format is None or spec.row_invariant or not choice.chosen.quantises_inputs:
        spec = replace(spec, activation_scheme=None)
    return spec, choice


def _log_conversion(spec: ExpertSpec, weight_format: WeightFormat, kernel: str, why: str) -> None:
    h, i = spec.hidden_size, spec.intermediate_size
    shapes = ((spec.activation.gate_up_rows(i), h), (h, i))
    stored = spec.num_experts * sum(weight_format.nbytes(*shape) for shape in shapes)
    kept = spec.num_experts * sum(math.prod(shape) for shape in shapes) * spec.dtype.itemsize
    log.info(
        "%s weights of %d experts are converted to %s for %s, %.1f MB instead of %.1f (%.1f times): %s",
        weight_format,
        spec.num_experts,
        str(spec.dtype).removeprefix("torch."),
        kernel,
        kept / 1e6,
        stored / 1e6,
        kept / stored,
        why,
    )


def expert_spec(
    config: LayerConfig,
    device: torch.device,
    experts: int,
    width: int,
    dtype: torch.dtype,
    exact: bool,
    scheme: ActivationScheme | None = None,
) -> ExpertSpec:
    """Describe what a kernel must be able to do for ``experts`` experts, ``width`` wide on this rank.

    ``scheme``: that by which the inputs of both products may be quantised.
    """
    return ExpertSpec(
        num_experts=experts,
        hidden_size=config.routed_size,
        intermediate_size=width,
        dtype=dtype,
        activation=config.activation,
        device=str(device),
        row_invariant=exact,
        bias=config.bias,
        activation_scheme=scheme,
        routed_experts=config.num_experts,
    )


def check_exact(exact: bool, grid: ProcessGrid) -> None:
    """Raise ValueError for exact mode with sliced experts: slicing changes the order of their sums."""
    if exact and grid.shape.etp > 1:
        raise ValueError(
            f"exact mode with etp={grid.shape.etp}: a sliced expert sums in another order; use etp=1"
        )


def slice_expert_width(config: LayerConfig, grid: ProcessGrid) -> slice:
    """Return this rank's slice of the width of every expert."""
    parts, unit = grid.etp.size, config.width_unit
    return slice_width("expert width", config.intermediate_size, parts, grid.etp.rank, unit)


def slice_width(what: str, width: int, parts: int, part: int, unit: int = 1) -> slice:
    """Return slice ``part`` of ``parts`` of an expert's width, which differ by at most one unit.

    Args:
        what: the width, for the message.
        width: the width I.
        parts: the number of slices.
        part: the slice to return.
        unit: the block of quantised weights. It is halved, which repeats scales, while a slice of whole
            blocks is much wider than the mean, down to ``LEAST_UNIT``, and further where a slice has none.
    """
    if width < parts:
        raise ValueError(f"{what} {width} cannot be sliced over {parts} ranks; use at most {width}")

    def is_uneven(unit: int) -> bool:
        units = -(-width // unit)
        widest = -(-units // parts) * unit
        return units < parts or (unit > LEAST_UNIT and widest * parts > UNEVEN * width)

    while unit > 1 and is_uneven(unit):
        unit = unit // 2 if unit % 2 == 0 else 1
    units = split_range(-(-width // unit), parts, part)
    return slice(units.start * unit, min(units.stop * unit, width))
