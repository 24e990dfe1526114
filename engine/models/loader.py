"""The loading of a whole model: transformers' code, the dense weights, and this rank's experts.

The result is a :class:`~xpar.engine.models.loaded_model.LoadedModel`.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from xpar.comm.column_parallel import ROUND_BYTES, ColumnParallel
from xpar.comm.communicator import Communicator
from xpar.comm.failure import agreed
from xpar.comm.grid import ProcessGrid
from xpar.comm.shared_window import SHARED_FILES, free_bytes
from xpar.engine.checkpoint.reader import Checkpoint
from xpar.engine.config import LayerConfig
from xpar.engine.formats.quantised_checkpoint import open_checkpoint
from xpar.engine.formats.quantised_on_load import QuantisedOnLoad
from xpar.engine.layer.checkpoint_config import allocation_errors, read_layer_configs
from xpar.engine.layer.expert_shard import slice_expert_width
from xpar.engine.models.block_layer import build_block
from xpar.engine.models.dense_weights import dense_sources, load_dense
from xpar.engine.models.empty_model import build_empty_model, is_known
from xpar.engine.models.expert_layer import (
    IMPLEMENTATION,
    ExpertLayer,
    experts_modules,
    register,
)
from xpar.engine.models.expert_sources import describe_stored, experts_reader, stored_experts
from xpar.engine.models.experts_module import describe_experts
from xpar.engine.models.fused_ops import fuse_loaded
from xpar.engine.models.loaded_model import LoadedModel, find_collective_modules
from xpar.engine.models.malloc import give_back_freed_memory, without_collection
from xpar.engine.models.packed_linear import pack_model
from xpar.engine.models.parallelize import (
    Layer,
    MoeModules,
    SpreadOptions,
    build_moe_modules,
    moe_modules,
    replace_modules,
)
from xpar.engine.models.quantised_dense import (
    DenseKernel,
    QuantisedProduct,
    choose_quantised,
    describe_formats,
    load_quantised,
)
from xpar.engine.models.weight_sources import Source, find_sources
from xpar.engine.models.weights_to_quantise import log_errors, weights_to_quantise
from xpar.kernels.choice import Choice
from xpar.kernels.cpu.linear import PLAIN, QUANTISED, LinearEntry, choose_linear

log = logging.getLogger("xpar.models")
LEAST_FREE = 4 * ROUND_BYTES
"""Bytes of shared memory that a node must have free before its ranks slice dense products.

Half is for the window of those products, half for other windows.
"""


def load_model(
    path: str | Path,
    grid: ProcessGrid,
    dtype: torch.dtype | None = None,
    options: SpreadOptions = SpreadOptions(),  # noqa: B008 - frozen
    on_bytes: Callable[[int], None] = lambda nbytes: None,
    on_total: Callable[[int], None] = lambda nbytes: None,
) -> LoadedModel:
    """Load a Hugging Face checkpoint of a known family over ``grid``. Collective over the grid.

    Args:
        path: Folder of the checkpoint.
        grid: The ranks that hold the experts.
        dtype: That of the computation; by default the checkpoint's.
        options: How the layers are computed.
        on_bytes: Is called with the bytes of each tensor that has arrived.
        on_total: Is called once with the bytes of weights that this rank will hold.

    Raises:
        AgreedError: The checkpoint, the options or an installed package does not fit; the same on every rank.
    """
    if grid.shape.tp > 1:
        raise ValueError(f"tp={grid.shape.tp}: dense layers of whole models are not sliced; use tp=1")
    with agreed(grid.world.comm, lambda: open_checkpoint(path)) as stored:
        plan = _make_plan(stored, grid, dtype, options)
        on_total(_bytes_to_hold(plan, grid))
        dense = _load_dense_weights(plan, grid, options, on_bytes)
        layers = _attach_layers(plan, grid, options, on_bytes)
        plan.model.to(grid.device)
        if options.fuse:
            names = [part.names[0] for part in plan.parts.values() if part.experts]
            fuse_loaded(plan.model, names, grid, plan.dtype, options.exact)
        kernels = (layer.runner.kernel for layer in layers.values())
        expert_bytes = sum(kernel.nbytes() for kernel in kernels if kernel is not None)
        _log_loaded(plan, dense, expert_bytes, options, grid.world.comm)
        return LoadedModel(
            plan.model,
            tuple(layers.values()),
            find_collective_modules(plan.model, plan.parts, layers),
            plan.dtype,
            dense.nbytes,
            expert_bytes,
            plan.checkpoint.bytes_read,
            dense.kernels,
        )


@dataclass(frozen=True)
class _LoadPlan:
    """The model without memory, and which stored tensors it is loaded from.

    Attributes:
        model: transformers' model.
        checkpoint: The weights, some of them quantised while they are read if the options say so.
        dtype: That of the computation.
        sources: The stored tensors of every parameter.
        dense: Those of the parameters outside of expert layers.
        parts: The modules that xpar's layers take over, by layer.
        linear: The kernel of dense products with weights in floats.
    """

    model: Any
    checkpoint: Checkpoint
    dtype: torch.dtype
    sources: Mapping[str, Source]
    dense: Mapping[str, Source]
    parts: dict[int, MoeModules]
    linear: Choice[LinearEntry]

    @property
    def foreign(self) -> tuple[str, ...]:
        """The beginnings of the names of parameters that xpar's layers fill."""
        return tuple(prefix for part in self.parts.values() for prefix in part.parameters)


@dataclass(frozen=True)
class _DenseWeights:
    """The dense weights that a rank has loaded: their bytes, and the kernels of their products.

    ``products``: those that stay codes.
    """

    nbytes: int
    kernels: str
    products: Sequence[QuantisedProduct]


@without_collection()
def _make_plan(
    stored: Checkpoint, grid: ProcessGrid, dtype: torch.dtype | None, options: SpreadOptions
) -> _LoadPlan:
    """Build the model without memory and find its stored tensors. Collective."""
    comm = grid.world.comm
    computed = agreed(comm, lambda: dtype or stored.dtype)
    linear = agreed(comm, lambda: _choose_dense(computed, grid.device, options))
    model = agreed(comm, lambda: build_empty_model(stored, computed))
    parts = agreed(comm, lambda: moe_modules(model, dict(stored.config), options.whole_block))
    sources = agreed(comm, lambda: find_sources(model, stored))
    plan = _LoadPlan(model, stored, computed, sources, {}, parts, linear)
    dense = agreed(comm, lambda: dense_sources(model, stored, sources, plan.foreign))
    plan = replace(plan, dense=dense)
    if (to := options.quantisation) is None:
        return plan
    weights = agreed(comm, lambda: weights_to_quantise(model, stored, sources, dense, parts, to).open())
    return replace(plan, checkpoint=weights)


def _load_dense_weights(
    plan: _LoadPlan, grid: ProcessGrid, options: SpreadOptions, on_bytes: Callable[[int], None]
) -> _DenseWeights:
    """Load all but the experts: codes of products, the other tensors, then packed products. Collective."""
    comm, node, model, checkpoint, dtype = grid.world.comm, grid.node, plan.model, plan.checkpoint, plan.dtype
    kernel, entry = DenseKernel(dtype, grid.device, options.dense), plan.linear.chosen
    products = agreed(comm, lambda: choose_quantised(model, checkpoint, plan.dense, kernel))
    is_packed = entry.name != PLAIN
    column_parallel = ColumnParallel(node) if is_packed and _slices(grid, options) else None
    # Inside, the ranks of a node fail together, so that none of them is missing from this agreement.
    nbytes = agreed(
        comm, lambda: load_quantised(model, checkpoint, products, node, dtype, column_parallel, on_bytes)
    )
    names = {f"{product.module}.{end}" for product in products for end in ("weight", "bias")}
    floats = {key: source for key, source in plan.dense.items() if key not in names}
    nbytes += agreed(comm, lambda: load_dense(model, checkpoint, floats, plan.foreign, node, dtype, on_bytes))
    if is_packed:
        # Weights are packed before experts are loaded: one weight at a time is in memory twice.
        nbytes += agreed(comm, lambda: pack_model(model, entry, column_parallel))
        give_back_freed_memory()
    return _DenseWeights(nbytes, f"{QUANTISED} and {entry.name}" if products else entry.name, products)


def _attach_layers(
    plan: _LoadPlan, grid: ProcessGrid, options: SpreadOptions, on_bytes: Callable[[int], None]
) -> dict[int, Layer]:
    """Load this rank's experts, and put xpar's layers in the places of the model's modules. Collective."""
    layers = agreed(grid.world.comm, lambda: _load_layers(plan, grid, options, on_bytes), patient=True)
    for layer, part in plan.parts.items():
        replace_modules(plan.model, part, layers[layer])
    if any(isinstance(layer, ExpertLayer) for layer in layers.values()):
        register()
        plan.model.set_experts_implementation(IMPLEMENTATION)
    return layers


def _log_loaded(
    plan: _LoadPlan, dense: _DenseWeights, expert_bytes: int, options: SpreadOptions, comm: Communicator
) -> None:
    """Log what this rank has of the model, and what quantised weights became. Collective."""
    checkpoint = plan.checkpoint
    log.info(
        "%s: %.1f MB of dense weights (%s products%s%s), %.1f MB of experts%s, %.1f MB read",
        type(plan.model).__name__,
        dense.nbytes / 1e6,
        dense.kernels,
        f": {describe_formats(dense.products)} from codes" if dense.products else "",
        "".join(f"; {name}: {why}" for name, why in plan.linear.rejected),
        expert_bytes / 1e6,
        "" if is_known(checkpoint.config) else " alone (no schema of this family's blocks)",
        checkpoint.bytes_read / 1e6,
    )
    if isinstance(checkpoint, QuantisedOnLoad) and options.quantisation is not None:
        log_errors(checkpoint, options.quantisation, comm)
    if conversions := checkpoint.describe_conversions(plan.dtype):
        log.info("quantised weights are converted: %s", conversions)


def expert_configs(path: Path) -> list[LayerConfig]:
    """Describe the experts of every layer of the model at ``path``; nothing of its weights is read.

    Raises :class:`CheckpointError` for a checkpoint that is no such model.
    """
    with open_checkpoint(path) as checkpoint:
        if is_known(checkpoint.config):
            return list(read_layer_configs(checkpoint).values())
        model = build_empty_model(checkpoint, torch.float32)
        return [describe_experts(model, name) for name in experts_modules(model).values()]


def _slices(grid: ProcessGrid, options: SpreadOptions) -> bool:
    """Return whether the ranks of a node slice dense products; all nodes decide alike.

    Collective where ``options`` ask for slices.
    """
    if not options.slice_dense:
        return False
    facts: list[tuple[int, int]] = grid.world.comm.all_gather_object((grid.node.size, free_bytes()))
    if (free := min(room for _, room in facts)) < LEAST_FREE:
        log.info("each rank keeps all dense weights: %s of a node has %.0f MB left", SHARED_FILES, free / 1e6)
        return False
    return max(size for size, _ in facts) > 1


def _choose_dense(dtype: torch.dtype, device: torch.device, options: SpreadOptions) -> Choice[LinearEntry]:
    """Choose the kernel of dense products with weights in floats.

    It is the plain one on a GPU, and in exact mode, where a row must not depend on its neighbours.
    """
    name = "auto" if options.dense == QUANTISED else options.dense
    if device.type == "cpu" and not options.exact:
        return choose_linear(dtype, name)
    if name not in ("auto", PLAIN):
        raise ValueError(
            f"dense={options.dense!r}: serves neither GPUs nor exact mode; choose auto or {PLAIN}"
        )
    return choose_linear(dtype, PLAIN)


def _bytes_to_hold(plan: _LoadPlan, grid: ProcessGrid) -> int:
    """Return the bytes of the dense weights and of this rank's part of the experts.

    The number is exact only if the experts divide evenly.
    """
    state = plan.model.state_dict()
    modules = [module for part in plan.parts.values() for module in part.modules]
    experts = sum(p.numel() for module in modules for p in module.parameters())
    dense = sum(int(state[key].numel()) for key in plan.dense)
    return plan.dtype.itemsize * (dense + experts // grid.moe.size)


def _load_layers(
    plan: _LoadPlan, grid: ProcessGrid, options: SpreadOptions, on_bytes: Callable[[int], None]
) -> dict[int, Layer]:
    model, checkpoint, sources, dtype = plan.model, plan.checkpoint, plan.sources, plan.dtype
    layers: dict[int, Layer] = {}
    for n, part in plan.parts.items():
        with allocation_errors(n, str(checkpoint.path / "config.json")):
            if part.experts:
                name = part.names[0]
                config = describe_stored(model, name, checkpoint, sources)
                read = experts_reader(model, name, checkpoint, sources, config, dtype)
                rows = slice_expert_width(config, grid)
                stored = stored_experts(model, name, checkpoint, sources, config, dtype, rows)
                layers[n] = build_moe_modules(config, grid, dtype, n, read, options, on_bytes, stored)
            else:
                before = checkpoint.bytes_read
                layers[n] = build_block(checkpoint, n, grid, dtype, options.of_layer())
                on_bytes(checkpoint.bytes_read - before)
    return layers
