"""A whole model on this rank: transformers' code, the dense weights, and this rank's experts."""

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch

from xpar.comm.column_parallel import ROUND_BYTES, ColumnParallel
from xpar.comm.failure import agreed
from xpar.comm.grid import ProcessGrid
from xpar.comm.shared_window import SHARED_FILES, free_bytes
from xpar.engine.checkpoint.reader import Checkpoint
from xpar.engine.config import LayerConfig
from xpar.engine.formats.quantised_checkpoint import open_checkpoint
from xpar.engine.formats.quantised_on_load import QuantisedOnLoad
from xpar.engine.layer.checkpoint_config import allocation_errors, read_layer_configs
from xpar.engine.layer.expert_shard import expert_rows
from xpar.engine.models.block_layer import build_block
from xpar.engine.models.dense_weights import dense_sources, load_dense
from xpar.engine.models.empty_model import build_empty_model, is_known
from xpar.engine.models.expert_layer import (
    IMPLEMENTATION,
    ExpertLayer,
    experts_modules,
    norms_slots,
    register,
)
from xpar.engine.models.expert_sources import describe_stored, experts_reader, stored_experts
from xpar.engine.models.experts_module import describe_experts
from xpar.engine.models.kv_cache import other_states
from xpar.engine.models.malloc import give_back_freed_memory
from xpar.engine.models.packed_linear import ColumnParallelLinear, group_by_input, pack_model
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


class CollectiveModule(Protocol):
    """A part of a model that every rank of its group calls together."""

    def join(self) -> None:
        """Take part without tokens of this rank's own."""


@dataclass(frozen=True)
class LoadedModel:
    """A transformers causal language model in eval mode; every rank of the grid calls it together.

    Attributes:
        model: The model.
        layers: Its expert layers.
        collective_modules: All modules that the ranks call together, the layers among them, in the order
            in which a forward calls them.
        dtype: That of the computation.
        dense_bytes: Bytes of dense weights on this rank.
        expert_bytes: Bytes of experts' weights on this rank.
        bytes_read: Bytes that this rank read from the checkpoint's files.
        dense: The kernels of dense products: that of weights in floats as
            :func:`~xpar.kernels.cpu.linear.choose_linear` names it, and that of codes if some stay codes.
    """

    model: Any
    layers: tuple[Layer, ...]
    collective_modules: tuple[CollectiveModule, ...]
    dtype: torch.dtype
    dense_bytes: int
    expert_bytes: int
    bytes_read: int
    dense: str

    @property
    def slices_dense(self) -> bool:
        """True if the ranks of a node slice its dense products."""
        return len(self.collective_modules) > len(self.layers)

    @property
    def is_cache_of_keys_and_values(self) -> bool:
        """True if the model keeps nothing but keys and values of a sequence's past."""
        return not other_states(self.model.config)

    @cached_property
    def sends_tokens_once(self) -> bool:
        """True if every layer gets each token of a forward as one row, not one row for each of its slots."""
        return not any(norms_slots(module) for module in self.model.modules())

    @property
    def device(self) -> torch.device:
        """The device of the model."""
        return self.layers[0].runner.grid.device

    @property
    def ranks_of_node(self) -> int:
        """The number of ranks on this rank's node."""
        return self.layers[0].runner.grid.node.size if self.layers else 1

    def slots(self) -> int:
        """Return how many (token, expert) pairs this rank's experts have computed."""
        return sum(layer.slots for layer in self.layers)

    def expect(self, tokens: Sequence[int] | None) -> None:
        """Announce the tokens of each rank in the next forward, or None where they are not agreed."""
        if self.layers and self.sends_tokens_once:
            grid = self.layers[0].runner.grid
            grid.agreed.tokens = None if tokens is None else tuple(tokens[r] for r in grid.moe.world_ranks)

    def join(self) -> None:
        """Take part in a forward of the other ranks without tokens of this rank's own."""
        for module in self.collective_modules:
            module.join()


def load_model(
    path: str | Path,
    grid: ProcessGrid,
    dtype: torch.dtype | None = None,
    options: SpreadOptions = SpreadOptions(),  # noqa: B008 - frozen
    loaded: Callable[[int], None] = lambda nbytes: None,
    total: Callable[[int], None] = lambda nbytes: None,
) -> LoadedModel:
    """Load a Hugging Face checkpoint of a known family over ``grid``. Collective over the grid.

    Args:
        path: Folder of the checkpoint.
        grid: The ranks that hold the experts.
        dtype: That of the computation; by default the checkpoint's.
        options: How the layers are computed.
        loaded: Is called with the bytes of each tensor that has arrived.
        total: Is called once with the bytes of weights that this rank will hold.

    Raises:
        AgreedError: The checkpoint, the options or an installed package does not fit; the same on every rank.
    """
    if grid.shape.tp > 1:
        raise ValueError(f"tp={grid.shape.tp}: dense layers of whole models are not sliced; use tp=1")
    comm = grid.world.comm
    with agreed(comm, lambda: open_checkpoint(path)) as stored:
        kind = agreed(comm, lambda: dtype or stored.dtype)
        chosen = agreed(comm, lambda: _choose_dense(kind, grid.device, options))
        model = agreed(comm, lambda: build_empty_model(stored, kind))
        parts = agreed(comm, lambda: moe_modules(model, dict(stored.config), options.whole_block))
        foreign = tuple(prefix for part in parts.values() for prefix in part.parameters)
        sources = agreed(comm, lambda: find_sources(model, stored))
        plan = agreed(comm, lambda: dense_sources(model, stored, sources, foreign))
        checkpoint: Checkpoint = stored
        if (to := options.quantisation) is not None:
            checkpoint = agreed(
                comm, lambda: weights_to_quantise(model, stored, sources, plan, parts, to).open()
            )
        total(_bytes_to_hold(model, plan, parts, grid, kind))
        kernel = DenseKernel(kind, grid.device, options.dense)
        products = agreed(comm, lambda: choose_quantised(model, checkpoint, plan, kernel))
        is_packed = (record := chosen.chosen).name != PLAIN
        shared = ColumnParallel(grid.node) if is_packed and _slices(grid, options) else None
        # Inside, the ranks of a node fail together, so that none of them is missing from this agreement.
        dense = agreed(
            comm, lambda: load_quantised(model, checkpoint, products, grid.node, kind, shared, loaded)
        )
        names = {f"{product.module}.{end}" for product in products for end in ("weight", "bias")}
        floats = {key: source for key, source in plan.items() if key not in names}
        dense += agreed(comm, lambda: load_dense(model, checkpoint, floats, foreign, grid.node, kind, loaded))
        if is_packed:
            # Weights are packed before experts are loaded: one weight at a time is in memory twice.
            dense += agreed(comm, lambda: pack_model(model, record, shared))
            give_back_freed_memory()
        dense_kernels = f"{QUANTISED} and {record.name}" if products else record.name
        layers = agreed(
            comm,
            lambda: _load_layers(model, checkpoint, sources, grid, kind, parts, options, loaded),
            patient=True,
        )
        for layer, part in parts.items():
            replace_modules(model, part, layers[layer])
        if any(isinstance(layer, ExpertLayer) for layer in layers.values()):
            register()
            model.set_experts_implementation(IMPLEMENTATION)
        model.to(grid.device)
        held = sum(k.nbytes() for k in (x.runner.kernel for x in layers.values()) if k is not None)
        log.info(
            "%s: %.1f MB of dense weights (%s products%s%s), %.1f MB of experts%s, %.1f MB read",
            type(model).__name__,
            dense / 1e6,
            dense_kernels,
            f": {describe_formats(products)} from codes" if products else "",
            "".join(f"; {name}: {why}" for name, why in chosen.rejected),
            held / 1e6,
            "" if is_known(checkpoint.config) else " alone (no schema of this family's blocks)",
            checkpoint.bytes_read / 1e6,
        )
        if isinstance(checkpoint, QuantisedOnLoad) and options.quantisation is not None:
            log_errors(checkpoint, options.quantisation, comm)
        if conversions := checkpoint.describe_conversions(kind):
            log.info("quantised weights are converted: %s", conversions)
        held_layers = tuple(layers.values())
        collective_modules = _find_collective_modules(model, parts, layers)
        return LoadedModel(
            model, held_layers, collective_modules, kind, dense, held, checkpoint.bytes_read, dense_kernels
        )


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


def _find_collective_modules(
    model: Any, parts: Mapping[int, MoeModules], layers: Mapping[int, Layer]
) -> tuple[CollectiveModule, ...]:
    """Find the modules that ranks call together, in the order of a forward.

    Collective where dense products are sliced: a forward shows the order.
    """
    sliced = [module for module in model.modules() if isinstance(module, ColumnParallelLinear)]
    if not sliced:
        return tuple(layers.values())
    collective_modules: dict[Any, CollectiveModule] = {
        model.get_submodule(part.names[0]): layers[n] for n, part in parts.items()
    }
    order = forward_order(model, [*collective_modules, *sliced])
    collective_modules |= group_by_input(order)
    for layer in layers.values():
        layer.reset_slots()  # the forward above was not a user's
    return tuple(collective_modules[module] for module, _ in order if module in collective_modules)


def forward_order(model: Any, modules: Iterable[torch.nn.Module]) -> list[tuple[torch.nn.Module, Any]]:
    """Run a forward of one token.

    List each of ``modules`` with its first argument, in the order of the calls.

    Collective. The arguments are kept alive, so that two are the same object only if they are one tensor.
    """
    order: list[tuple[torch.nn.Module, Any]] = []

    def called(module: torch.nn.Module, args: tuple[Any, ...]) -> None:
        order.append((module, args[0] if args else None))

    handles = [module.register_forward_pre_hook(called) for module in modules]
    try:
        with torch.inference_mode():
            model(input_ids=torch.zeros(1, 1, dtype=torch.int64), use_cache=False, logits_to_keep=1)
    finally:
        for handle in handles:
            handle.remove()
    return order


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


def _bytes_to_hold(
    model: Any,
    plan: Iterable[str],
    parts: dict[int, MoeModules],
    grid: ProcessGrid,
    dtype: torch.dtype,
) -> int:
    """Return the bytes of the dense weights and of this rank's part of the experts.

    The number is exact only if the experts divide evenly.
    """
    state = model.state_dict()
    experts = sum(
        p.numel() for part in parts.values() for module in part.modules for p in module.parameters()
    )
    dense = sum(int(state[key].numel()) for key in plan)
    return dtype.itemsize * (dense + experts // grid.moe.size)


def _load_layers(
    model: Any,
    checkpoint: Checkpoint,
    sources: Mapping[str, Source],
    grid: ProcessGrid,
    dtype: torch.dtype,
    parts: dict[int, MoeModules],
    options: SpreadOptions,
    loaded: Callable[[int], None],
) -> dict[int, Layer]:
    layers: dict[int, Layer] = {}
    for n, part in parts.items():
        with allocation_errors(n, str(checkpoint.path / "config.json")):
            if part.experts:
                name = part.names[0]
                config = describe_stored(model, name, checkpoint, sources)
                read = experts_reader(model, name, checkpoint, sources, config, dtype)
                rows = expert_rows(config, grid)
                stored = stored_experts(model, name, checkpoint, sources, config, dtype, rows)
                layers[n] = build_moe_modules(config, grid, dtype, n, read, options, loaded, stored)
            else:
                before = checkpoint.bytes_read
                layers[n] = build_block(checkpoint, n, grid, dtype, options.of_layer())
                loaded(checkpoint.bytes_read - before)
    return layers
