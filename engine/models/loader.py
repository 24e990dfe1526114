"""A whole model on this rank: transformers' code, its dense weights, and this rank's experts, nothing else's."""

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from xpar.comm.column_parallel import ROUND_BYTES, ColumnParallel
from xpar.comm.failure import agreed
from xpar.comm.grid import ProcessGrid
from xpar.comm.shared_window import SHARED_FILES, free_bytes
from xpar.engine.architectures.layer_config import find, layer_config, require_moe_layers
from xpar.engine.architectures.layer_weights import stream_experts
from xpar.engine.checkpoint.reader import Checkpoint
from xpar.engine.config import LayerConfig
from xpar.engine.models.block_layer import build_block
from xpar.engine.models.dense_weights import load_dense, sources
from xpar.engine.models.expert_layer import IMPLEMENTATION, ExpertLayer, register
from xpar.engine.models.hf_config import read_hf_config
from xpar.engine.models.kv_cache import other_states
from xpar.engine.models.malloc import give_back_freed_memory
from xpar.engine.models.order import CollectiveModule, forward_order
from xpar.engine.models.packed_linear import ColumnParallelLinear, group_by_input, pack_model
from xpar.engine.models.parallelize import (
    Experts,
    Layer,
    MoeModules,
    ReadLayer,
    SpreadOptions,
    build_moe_modules,
    moe_modules,
    replace_modules,
)
from xpar.kernels.choice import Choice
from xpar.kernels.cpu.linear import PLAIN, LinearEntry, choose_linear

log = logging.getLogger("xpar.models")
LEAST_FREE = 4 * ROUND_BYTES
"""Of memory shared within a node, for its ranks to share out dense products: their window, and as much for others."""


@dataclass(frozen=True)
class LoadedModel:
    """``model``: a transformers causal language model in eval mode; every rank of the grid calls it together.

    ``layers``: its expert layers. ``joints``: all that the ranks do together, these among it, in the order in which a
    forward calls them. ``dense_bytes``, ``expert_bytes``:
    weights held by this rank. ``bytes_read``: bytes that this rank took from the checkpoint's files. ``dense``: what
    computes dense products, as :func:`~xpar.kernels.cpu.linear.choose_linear` names it.
    """

    model: Any
    layers: tuple[Layer, ...]
    joints: tuple[CollectiveModule, ...]
    dtype: torch.dtype
    dense_bytes: int
    expert_bytes: int
    bytes_read: int
    dense: str

    @property
    def slices_dense(self) -> bool:
        """Whether the ranks of a node share out its dense products."""
        return len(self.joints) > len(self.layers)

    @property
    def is_cache_of_keys_and_values(self) -> bool:
        """Whether keys and values are all that the model keeps of a sequence's past."""
        return not other_states(self.model.config)

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self.layers[0].runner.grid.device

    def slots(self) -> int:
        """(token, expert) pairs that this rank's experts have computed."""
        return sum(layer.slots for layer in self.layers)

    def expect(self, tokens: Sequence[int] | None) -> None:
        """Announce the next forward's tokens of each rank of the world, if all have agreed on them; None: they have not."""
        window = self.layers[0].runner.grid.peer_window if self.layers else None
        if window is not None:
            window.expected = None if tokens is None else tuple(tokens[r] for r in window.group.world_ranks)

    def join(self) -> None:
        """Take part in a forward of the other ranks without tokens of one's own."""
        for joint in self.joints:
            joint.join()


def load_model(
    path: str | Path,
    grid: ProcessGrid,
    dtype: torch.dtype | None = None,
    options: SpreadOptions = SpreadOptions(),  # noqa: B008 - frozen
    loaded: Callable[[int], None] = lambda nbytes: None,
    total: Callable[[int], None] = lambda nbytes: None,
) -> LoadedModel:
    """Load a Hugging Face checkpoint of a known family over ``grid``; collective over it.

    ``dtype``: that of the computation, by default the checkpoint's. ``total`` hears how many bytes of weights this rank
    will hold, ``loaded`` those of each tensor as it arrives. Raises one :class:`~xpar.comm.failure.AgreedError` on every rank for a checkpoint, options or package
    that does not fit.
    """
    if grid.shape.tp > 1:
        raise ValueError(f"tp={grid.shape.tp}: dense layers of whole models are not sliced; use tp=1")
    comm = grid.world.comm
    with agreed(comm, lambda: Checkpoint(Path(path))) as checkpoint:
        kind = agreed(comm, lambda: dtype or checkpoint.dtype)
        chosen = agreed(comm, lambda: _choose_dense(kind, grid.device, options))
        model, parts = agreed(comm, lambda: _empty_model(checkpoint, kind, options.whole_block))
        foreign = tuple(f"{name}." for part in parts.values() for name in part.names)
        plan = agreed(comm, lambda: sources(model, checkpoint, foreign))
        total(_bytes_to_hold(model, plan, parts, grid, kind))
        # The ranks of a node fail together inside, so that none of them is missing from this agreement.
        dense = agreed(comm, lambda: load_dense(model, checkpoint, plan, foreign, grid.node, kind, loaded))
        if (record := chosen.chosen).name != PLAIN:
            # Before the experts come: one weight at a time is there twice.
            shared = ColumnParallel(grid.node) if _slices(grid, options) else None
            dense += agreed(comm, lambda: pack_model(model, record, shared))
            give_back_freed_memory()
        layers = agreed(
            comm, lambda: _load_layers(checkpoint, grid, kind, parts, options, loaded), patient=True
        )
        for layer, part in parts.items():
            replace_modules(model, part, layers[layer])
        if any(isinstance(layer, ExpertLayer) for layer in layers.values()):
            register()
            model.set_experts_implementation(IMPLEMENTATION)
        model.to(grid.device)
        held = sum(k.nbytes() for k in (x.runner.kernel for x in layers.values()) if k is not None)
        log.info(
            "%s: %.1f MB of dense weights (%s products%s), %.1f MB of experts, %.1f MB read",
            type(model).__name__,
            dense / 1e6,
            chosen.name,
            "".join(f"; {name}: {why}" for name, why in chosen.rejected),
            held / 1e6,
            checkpoint.bytes_read / 1e6,
        )
        held_layers = tuple(layers.values())
        joints = _joints(model, parts, layers)
        return LoadedModel(model, held_layers, joints, kind, dense, held, checkpoint.bytes_read, chosen.name)


def _slices(grid: ProcessGrid, options: SpreadOptions) -> bool:
    """Whether the ranks of a node share out dense products: all nodes decide alike. Collective where it is asked for."""
    if not options.slice_dense:
        return False
    facts: list[tuple[int, int]] = grid.world.comm.all_gather_object((grid.node.size, free_bytes()))
    if (free := min(room for _, room in facts)) < LEAST_FREE:
        log.info("each rank keeps all dense weights: %s of a node has %.0f MB left", SHARED_FILES, free / 1e6)
        return False
    return max(size for size, _ in facts) > 1


def _joints(
    model: Any, parts: Mapping[int, MoeModules], layers: Mapping[int, Layer]
) -> tuple[CollectiveModule, ...]:
    """All that ranks do together, in order. Collective where that takes a forward to find out."""
    sliced = [module for module in model.modules() if isinstance(module, ColumnParallelLinear)]
    if not sliced:
        return tuple(layers.values())
    joints: dict[Any, CollectiveModule] = {
        model.get_submodule(part.names[0]): layers[n] for n, part in parts.items()
    }
    order = forward_order(model, [*joints, *sliced])
    joints |= group_by_input(order)
    for layer in layers.values():
        layer.reset_slots()  # that forward was nobody's
    return tuple(joints[module] for module, _ in order if module in joints)


def _choose_dense(dtype: torch.dtype, device: torch.device, options: SpreadOptions) -> Choice[LinearEntry]:
    """Plain products on a GPU, and in exact mode, where a row must not depend on its neighbours."""
    if device.type == "cpu" and not options.exact:
        return choose_linear(dtype, options.dense)
    if options.dense not in ("auto", PLAIN):
        raise ValueError(
            f"dense={options.dense!r}: serves neither GPUs nor exact mode; choose auto or {PLAIN}"
        )
    return choose_linear(dtype, PLAIN)


def _empty_model(
    checkpoint: Checkpoint, dtype: torch.dtype, whole_block: bool
) -> tuple[Any, dict[int, MoeModules]]:
    """The model without memory, and what of each MoE layer makes way, in ascending order."""
    if find_spec("transformers") is None:
        raise ValueError("whole models need transformers (pip install 'xpar[hf]')")
    from transformers import AutoModelForCausalLM

    # What no command can do is said before transformers builds anything.
    arch = find(checkpoint.config)
    for layer in require_moe_layers(arch, checkpoint.config):
        layer_config(arch, checkpoint.config, layer)
    hf_config = read_hf_config(checkpoint.path)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(hf_config, dtype=dtype)
    model.eval()
    model.get_output_embeddings().register_forward_pre_hook(_in_one_piece)
    return model, moe_modules(model, dict(checkpoint.config), whole_block)


def _in_one_piece(_: torch.nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """The last positions of several rows lie apart, and torch multiplies such by a copy of the weight for each row."""
    return inputs[0].contiguous(), *inputs[1:]


def _bytes_to_hold(
    model: Any,
    plan: Iterable[str],
    parts: dict[int, MoeModules],
    grid: ProcessGrid,
    dtype: torch.dtype,
) -> int:
    """Dense weights, and this rank's share of the experts' (to the byte only if they divide evenly)."""
    state = model.state_dict()
    experts = sum(
        p.numel() for part in parts.values() for module in part.modules for p in module.parameters()
    )
    dense = sum(int(state[key].numel()) for key in plan)
    return dtype.itemsize * (dense + experts // grid.moe.size)


def _load_layers(
    checkpoint: Checkpoint,
    grid: ProcessGrid,
    dtype: torch.dtype,
    parts: dict[int, MoeModules],
    options: SpreadOptions,
    loaded: Callable[[int], None],
) -> dict[int, Layer]:
    arch = find(checkpoint.config)
    layers: dict[int, Layer] = {}
    for n, part in parts.items():
        if part.experts:
            config = layer_config(arch, checkpoint.config, n)
            read = _reader(checkpoint, n, config, dtype)
            layers[n] = build_moe_modules(config, grid, dtype, n, read, options, loaded)
        else:
            before = checkpoint.bytes_read
            layers[n] = build_block(checkpoint, n, grid, dtype, options.of_layer())
            loaded(checkpoint.bytes_read - before)
    return layers


def _reader(checkpoint: Checkpoint, layer: int, config: LayerConfig, dtype: torch.dtype) -> ReadLayer:
    def read(experts: Sequence[int], rows: slice) -> Experts:
        return stream_experts(checkpoint, find(checkpoint.config), layer, config, experts, dtype, rows)

    return read
