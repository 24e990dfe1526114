"""Building expert layers over a grid, from a checkpoint or from a model that is already in memory."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from xpar.comm.failure import agreed
from xpar.comm.grid import ProcessGrid
from xpar.engine.architectures import find, layer_config, moe_layers
from xpar.engine.build import ExpertOptions, hold_experts
from xpar.engine.checkpoint import CheckpointError
from xpar.engine.config import LayerConfig
from xpar.engine.mlp_tensors import MlpTensors
from xpar.engine.models.experts import IMPLEMENTATION, ExpertLayer, attach, experts_modules, register

__all__ = ["ExpertOptions", "Experts", "Read", "build_layer", "moe_modules", "parallelize"]

Experts = Iterator[tuple[int, MlpTensors]]
Read = Callable[[Sequence[int], slice], Experts]
"""(global expert ids, rows of the expert width) -> (position, tensors) of each, as ``load_expert`` takes them."""


def build_layer(
    config: LayerConfig,
    grid: ProcessGrid,
    dtype: torch.dtype,
    layer: int,
    read: Read,
    options: ExpertOptions,
    loaded: Callable[[int], None] = lambda nbytes: None,
) -> ExpertLayer:
    """This rank's part of a layer's experts, read through ``read``; ``loaded`` hears the bytes of each expert.

    Holds no collective. Raises ValueError for options that do not fit the grid, the layer or this machine.
    """
    held = hold_experts(config, grid, dtype, options)
    if held.kernel is not None:
        for index, tensors in read(held.experts, held.rows):
            held.kernel.load_expert(index, *tensors)
            loaded(sum(t.nbytes for t in tensors if t is not None))
    return ExpertLayer(
        config, grid, held.dispatcher, held.kernel, dtype=dtype, exact=options.exact, layer=layer
    )


def moe_modules(model: torch.nn.Module, hf_config: dict[str, Any]) -> dict[int, torch.nn.Module]:
    """The experts module of each MoE layer; raises :class:`CheckpointError` unless they are exactly the config's."""
    wanted = moe_layers(find(hf_config), hf_config)
    found = experts_modules(model)
    if sorted(found) != sorted(wanted):
        raise CheckpointError(
            f"{type(model).__name__} lets the experts of layers {sorted(found)} be provided, config.json has experts "
            f"in layers {list(wanted)}; this model's blocks cannot be spread"
        )
    return found


def parallelize(
    model: Any,
    grid: ProcessGrid,
    *,
    dispatcher: str = "auto",
    kernel: str = "auto",
    exact: bool = False,
) -> Any:
    """Spread the experts of ``model``, a transformers model that every rank has in memory, over ``grid``.

    Each rank keeps its own experts and drops the others; everything else stays as it is. Returns ``model``, whose
    forward every rank must call from now on, with tokens of its own. Collective over the grid; raises one error on
    every rank for a model whose blocks do not let their experts be provided.
    """
    options = ExpertOptions(dispatcher, kernel, exact)
    register()
    layers = agreed(grid.world.comm, lambda: _from_memory(model, grid, options), "parallelize")
    for layer, module in experts_modules(model).items():
        attach(module, layers[layer])
    model.set_experts_implementation(IMPLEMENTATION)
    return model


def _from_memory(model: Any, grid: ProcessGrid, options: ExpertOptions) -> dict[int, ExpertLayer]:
    hf_config = model.config.to_dict()
    arch = find(hf_config)
    layers = {}
    for layer, module in moe_modules(model, hf_config).items():
        config = layer_config(arch, hf_config, layer)
        layers[layer] = build_layer(config, grid, model.dtype, layer, _rows_of(module), options)
    return layers


def _rows_of(module: Any) -> Read:
    """The experts of a module that holds them stacked: gate_up [E, 2I, H], gate rows first, and down [E, H, I]."""
    if module.has_bias or module.is_transposed or not module.has_gate or not module.is_concatenated:
        raise ValueError(
            f"{type(module).__name__}: experts with biases, transposed, interleaved or without gate are read from "
            "checkpoints only; load the model with xpar generate or xpar.engine.models.load"
        )

    def read(experts: Sequence[int], rows: slice) -> Experts:
        for index, expert in enumerate(experts):
            gate, up = module.gate_up_proj[expert].detach().chunk(2)
            gate_up, down = torch.cat([gate[rows], up[rows]]), module.down_proj[expert].detach()[:, rows]
            yield index, MlpTensors(gate_up, down)

    return read
