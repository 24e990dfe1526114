"""Building expert layers over a grid, from a checkpoint or from a model that is already in memory."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from xpar.comm.failure import agreed
from xpar.comm.grid import ProcessGrid
from xpar.engine.architectures.layer_config import find, layer_config, require_moe_layers
from xpar.engine.architectures.mlp_weights import MlpPlace, MlpTensors, mlp_buffers, read_mlp
from xpar.engine.architectures.schema import MlpNames
from xpar.engine.checkpoint.in_memory import InMemory
from xpar.engine.checkpoint.reader import CheckpointError
from xpar.engine.config import LayerConfig
from xpar.engine.layer.expert_shard import build_expert_shard
from xpar.engine.layer.options import ExpertOptions, LayerOptions
from xpar.engine.layer.runner import MoERunner
from xpar.engine.models.block_layer import (
    LAYERS_ALONE,
    BlockLayer,
    NoModule,
    block_modules,
    build_block,
    weights_of,
)
from xpar.engine.models.expert_layer import (
    ATTRIBUTE,
    IMPLEMENTATION,
    ExpertLayer,
    attach,
    experts_modules,
    register,
)

Layer = ExpertLayer | BlockLayer
Experts = Iterator[tuple[int, MlpTensors]]
ReadLayer = Callable[[Sequence[int], slice], Experts]
"""(global expert ids, rows of the expert width) -> (position, tensors) of each, as ``load_expert`` takes them."""


@dataclass(frozen=True)
class SpreadOptions(ExpertOptions):
    """How a model's layers are computed. ``whole_block``: xpar's router and shared experts, not the model's own.

    ``dense``: of a model that is loaded: a name of :mod:`xpar.kernels.cpu.linear`, plain, or auto. ``slice_dense``: the ranks
    of a node share out its packed dense products (:class:`~xpar.comm.column_parallel.ColumnParallel`); then every rank must run
    as many products as the others, which scoring does not.
    """

    whole_block: bool = False
    dense: str = "auto"
    slice_dense: bool = False

    def of_layer(self) -> LayerOptions:
        """The same for a runner."""
        return LayerOptions(self.dispatcher, self.kernel, self.exact)


def build_moe_modules(
    config: LayerConfig,
    grid: ProcessGrid,
    dtype: torch.dtype,
    layer: int,
    read: ReadLayer,
    options: SpreadOptions,
    loaded: Callable[[int], None] = lambda nbytes: None,
) -> ExpertLayer:
    """This rank's part of a layer's experts, read through ``read``; ``loaded`` hears the bytes of each expert.

    Holds no collective. Raises ValueError for options that do not fit the grid, the layer or this machine.
    """
    experts = build_expert_shard(config, grid, dtype, options)
    if experts.kernel is not None:
        for index, tensors in read(experts.experts, experts.rows):
            experts.kernel.load_expert(index, *tensors)
            loaded(sum(t.nbytes for t in tensors if t is not None))
    return ExpertLayer(
        MoERunner(
            experts_alone(config), grid, None, experts, dtype=dtype, options=options.of_layer(), layer=layer
        )
    )


def experts_alone(config: LayerConfig) -> LayerConfig:
    """Describe the routed experts of a layer as a layer of their own, whose tokens are the experts' input."""
    return replace(config, hidden_size=config.routed_size, latent_size=None, shared=None, output_bias=False)


def parallelize(
    model: Any,
    grid: ProcessGrid,
    *,
    dispatcher: str = "auto",
    kernel: str = "auto",
    exact: bool = False,
    whole_block: bool = False,
) -> Any:
    """Spread the experts of ``model``, a transformers model that every rank has in memory, over ``grid``.

    Each rank keeps its own experts and drops the others; everything else stays as it is. ``whole_block``: the router,
    the shared experts and all else of a block are xpar's too, as they are anyway in families whose block does not let
    its experts be provided. Returns ``model``, whose forward every rank must call from now on, with tokens of its own,
    or :func:`serve_other_ranks` without. Collective over the grid; raises one error on every rank for a model of no known family.
    """
    options = SpreadOptions(dispatcher, kernel, exact, whole_block)
    hf_config = model.config.to_dict()
    parts = agreed(grid.world.comm, lambda: moe_modules(model, hf_config, whole_block), "parallelize")
    layers = agreed(
        grid.world.comm, lambda: _from_memory(model, hf_config, parts, grid, options), "parallelize"
    )
    for layer, part in parts.items():
        replace_modules(model, part, layers[layer])
    if any(isinstance(layer, ExpertLayer) for layer in layers.values()):
        register()
        model.set_experts_implementation(IMPLEMENTATION)
    return model


def expert_layers(model: torch.nn.Module) -> tuple[Layer, ...]:
    """The layers of ``model`` that are spread, in the order in which its forward calls them."""
    found: list[Layer] = []
    for module in model.modules():
        layer = module if isinstance(module, BlockLayer) else getattr(module, ATTRIBUTE, None)
        if layer is not None:
            found.append(layer)
    return tuple(found)


def serve_other_ranks(model: torch.nn.Module) -> None:
    """Take part in a forward of the other ranks without tokens of this rank; collective.

    Raises:
        ValueError: The model is not yet spread over ranks.
    """
    layers = expert_layers(model)
    if not layers:
        raise ValueError(
            f"{type(model).__name__} is not spread over ranks; call parallelize(model, grid) before a rank joins"
        )
    for layer in layers:
        layer.join()


@dataclass(frozen=True)
class MoeModules:
    """What of a model makes way for a layer: modules, by name. ``experts``: only the experts of a block.

    The layer takes the place of the first; what it holds of the others is in its output.
    """

    names: tuple[str, ...]
    modules: tuple[torch.nn.Module, ...]
    experts: bool


def moe_modules(
    model: torch.nn.Module, hf_config: dict[str, Any], whole_block: bool
) -> dict[int, MoeModules]:
    """Of each MoE layer, ascending: its experts, or where they cannot be provided or ``whole_block`` is asked, its block."""
    arch = find(hf_config)
    if why := LAYERS_ALONE.get(arch.model_type):
        raise CheckpointError(f"model_type={arch.model_type!r}: {why}; xpar run computes its layers")
    layers = require_moe_layers(arch, hf_config)
    experts = experts_modules(model)
    if not whole_block and sorted(experts) == sorted(layers):
        names = {id(module): name for name, module in model.named_modules()}
        return {n: MoeModules((names[id(module)],), (module,), True) for n, module in sorted(experts.items())}
    return {
        n: MoeModules(names, tuple(map(model.get_submodule, names)), False)
        for n, names in block_modules(model, hf_config).items()
    }


def replace_modules(model: torch.nn.Module, part: MoeModules, layer: Layer) -> None:
    """Let ``layer`` take the place of ``part``."""
    if isinstance(layer, BlockLayer):
        model.set_submodule(part.names[0], layer)
        for name in part.names[1:]:
            model.set_submodule(name, NoModule())
    else:
        attach(part.modules[0], layer)


def _from_memory(
    model: Any,
    hf_config: dict[str, Any],
    parts: dict[int, MoeModules],
    grid: ProcessGrid,
    options: SpreadOptions,
) -> dict[int, Layer]:
    arch = find(hf_config)
    layers: dict[int, Layer] = {}
    for n, part in parts.items():
        if part.experts:
            config = layer_config(arch, hf_config, n)
            layers[n] = build_moe_modules(
                config, grid, model.dtype, n, rows_of(part.modules[0], config), options
            )
        else:
            weights = weights_of(model, hf_config, part.names)
            layers[n] = build_block(weights, n, grid, model.dtype, options.of_layer())
    return layers


def rows_of(module: Any, config: LayerConfig) -> ReadLayer:
    """The experts of a module that holds them stacked, in whichever of transformers' layouts."""
    if getattr(module, "has_post_expert_norm", False):
        raise ValueError(
            f"{type(module).__name__}: a norm behind each expert is not among what xpar computes"
        )
    names = MlpNames(
        gate=None,
        up=None if module.has_gate else "up_proj",
        gate_up="gate_up_proj" if module.has_gate else None,
        down="down_proj",
        gate_up_bias=("gate_up_proj_bias" if module.has_gate else "up_proj_bias")
        if module.has_bias
        else None,
        down_bias="down_proj_bias" if module.has_bias else None,
        storage="stacked",
        interleaved=not module.is_concatenated,
        up_transposed=module.is_transposed,
        down_transposed=module.is_transposed,
    )
    weights = InMemory({}, dict(module.named_parameters()))
    dtype = next(module.parameters()).dtype

    def read(experts: Sequence[int], rows: slice) -> Experts:
        place = MlpPlace(
            names, 0, config.routed_size, config.intermediate_size, rows, experts=config.num_experts
        )
        out = mlp_buffers(place, dtype)
        for index, expert in enumerate(experts):
            read_mlp(weights, replace(place, expert=expert), out)
            yield index, out

    return read
