"""Expert layers over a grid, built from a checkpoint or from a model that is already in memory."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch

from xpar.comm.failure import agreed
from xpar.comm.grid import ProcessGrid
from xpar.engine.architectures import ARCHITECTURES
from xpar.engine.architectures.layer_config import find, layer_config
from xpar.engine.architectures.mlp_weights import MlpPlace, MlpTensors, mlp_buffers, read_mlp
from xpar.engine.architectures.quantised_mlp import QuantisedTensors
from xpar.engine.checkpoint.in_memory import InMemoryCheckpoint
from xpar.engine.checkpoint.reader import CheckpointError
from xpar.engine.config import LayerConfig
from xpar.engine.layer.expert_shard import build_expert_shard
from xpar.engine.layer.options import ExpertOptions, LayerOptions
from xpar.engine.layer.residual_scaling import ResidualScale, scale_layer_output
from xpar.engine.layer.runner import MoERunner
from xpar.engine.models.block_layer import (
    BlockLayer,
    NoModule,
    block_modules,
    build_block,
    weights_of,
)
from xpar.engine.models.empty_model import is_known
from xpar.engine.models.expert_layer import (
    ATTRIBUTE,
    IMPLEMENTATION,
    ExpertLayer,
    attach,
    experts_modules,
    register,
)
from xpar.engine.models.experts_module import describe_experts, module_names
from xpar.engine.models.scale_decoder import check_parts, scale_decoder
from xpar.kernels.contracts import QuantisedKernel
from xpar.kernels.quantised_weight import WeightFormat

Layer = ExpertLayer | BlockLayer
Experts = Iterator[tuple[int, MlpTensors]]
ReadLayer = Callable[[Sequence[int], slice], Experts]
"""(global expert ids, rows of the expert width) -> (position, tensors) of each, as for ``load_expert``."""
LEAST_SLICE = 256
"""Rows of an expert's narrowest slice; products of fewer rows do not read their weights at full speed."""
SLICE_UNIT = 64
"""Rows that every slice is a multiple of: products are tiled by as many, or by a divisor of it."""


@dataclass(frozen=True)
class SpreadOptions(ExpertOptions):
    """The options of how a model's layers are computed.

    Attributes:
        whole_block: Whether xpar computes router and shared experts, too.
        dense: The kernel of dense products of a model that is loaded: a name of
            :mod:`xpar.kernels.cpu.linear`, plain, or auto.
        slice_dense: Whether the ranks of a node slice the packed dense products
            (:class:`~xpar.comm.column_parallel.ColumnParallel`). Every rank must then run as many products as
            the others, which scoring does not.
        scale_residual: Whether a model in memory keeps its residual over the routed scaling factor.
        fuse: Whether a model that is loaded on GPUs computes its small operations in fewer launches
            (:mod:`xpar.engine.models.fused_ops`).
    """

    whole_block: bool = False
    dense: str = "auto"
    slice_dense: bool = False
    scale_residual: bool = False
    fuse: bool = True

    def of_layer(self) -> LayerOptions:
        """Return the options of one layer."""
        return LayerOptions(self.dispatcher, self.kernel, self.exact, self.activations)


@dataclass(frozen=True)
class StoredExperts:
    """A layer's experts as a quantised checkpoint has them.

    Attributes:
        weight_format: The format of this rank's slice of each.
        read: Yields (local index, codes and scales and biases) of the experts with the given ids.
    """

    weight_format: WeightFormat
    read: Callable[[Sequence[int]], Iterator[tuple[int, QuantisedTensors]]]


def build_moe_modules(
    config: LayerConfig,
    grid: ProcessGrid,
    dtype: torch.dtype,
    layer: int,
    read: ReadLayer,
    options: SpreadOptions,
    on_bytes: Callable[[int], None] = lambda nbytes: None,
    stored: StoredExperts | None = None,
) -> ExpertLayer:
    """Build this rank's part of a layer's experts, read by ``read``; no collective is called.

    ``on_bytes`` is called with the bytes of each expert, as numbers of ``dtype``. ``stored``: the experts'
    codes and scales, which stay as they are if a kernel computes from them. Raises ValueError for options
    that do not fit the grid, the layer or this machine.
    """
    weight_format = None if stored is None else stored.weight_format
    experts = build_expert_shard(config, grid, dtype, options, weight_format=weight_format)
    if stored is not None and experts.weight_format is not None:
        kernel = cast(QuantisedKernel, experts.kernel)
        for index, codes in stored.read(experts.experts):
            kernel.load_quantised(index, *codes)
            on_bytes(sum(math.prod(t.shape) for t in codes if t is not None) * dtype.itemsize)
    elif experts.kernel is not None:
        for index, tensors in read(experts.experts, experts.width_slice):
            experts.kernel.load_expert(index, *tensors)
            on_bytes(sum(t.nbytes for t in tensors if t is not None))
    return ExpertLayer(
        MoERunner(
            experts_alone(config), grid, None, experts, dtype=dtype, options=options.of_layer(), layer=layer
        )
    )


def experts_alone(config: LayerConfig) -> LayerConfig:
    """Describe the routed experts of a layer as a layer of their own, whose tokens are the experts' input."""
    return replace(config, hidden_size=config.routed_size, latent_size=None, shared=None, output_bias=False)


def choose_expert_slices(ranks: int, layers: Iterable[LayerConfig]) -> int:
    """Choose over how many of a node's ``ranks`` each expert of ``layers`` is sliced; it divides ``ranks``.

    The few experts of a token seldom lie evenly on the ranks, and all ranks wait for the one with the most:
    with slices every rank has a part of each expert. Ranks of one node read each other's rows in place, so
    that a token for all of them costs no more than a token for some.
    """
    widths = [layer.intermediate_size for layer in layers]
    fit = (
        n
        for n in range(1, ranks + 1)
        if ranks % n == 0 and all(w % (n * SLICE_UNIT) == 0 and w // n >= LEAST_SLICE for w in widths)
    )
    return max(fit, default=1)


def parallelize(
    model: Any,
    grid: ProcessGrid,
    *,
    dispatcher: str = "auto",
    kernel: str = "auto",
    exact: bool = False,
    whole_block: bool = False,
    scale_residual: bool = False,
) -> Any:
    """Spread the experts of ``model`` over ``grid``. Collective over the grid.

    Each rank keeps its own experts and drops the others; everything else stays as it is. From now on every
    rank must call the model's forward, with tokens of its own, or :func:`serve_other_ranks` without tokens.

    Args:
        model: A transformers model that every rank has in memory.
        grid: The ranks.
        dispatcher: A dispatcher's name, or auto.
        kernel: A kernel's name, or auto.
        exact: Whether results must not depend on the number of ranks.
        whole_block: Whether xpar also computes the router, the shared experts and all else of a block. It
            does so anyway in families whose block does not let its experts be provided.
        scale_residual: Keep the residual of a float16 model below 65504: whole blocks and decoder compute it
            over the routed scaling factor (:func:`~xpar.engine.models.scale_decoder.scale_decoder`). The
            logits stay the same.

    Returns:
        ``model``, changed in place.

    Raises:
        AgreedError: The model is of no known family, or cannot be spread in this way; the same on every rank.
    """
    options = SpreadOptions(dispatcher, kernel, exact, whole_block=whole_block, scale_residual=scale_residual)
    hf_config = model.config.to_dict()
    parts = agreed(grid.world.comm, lambda: moe_modules(model, hf_config, whole_block), "parallelize")
    scale = agreed(grid.world.comm, lambda: _check_scale(model, hf_config, parts, options), "parallelize")
    layers = agreed(
        grid.world.comm, lambda: _from_memory(model, hf_config, parts, grid, options), "parallelize"
    )
    for layer, part in parts.items():
        replace_modules(model, part, layers[layer])
    if any(isinstance(layer, ExpertLayer) for layer in layers.values()):
        register()
        model.set_experts_implementation(IMPLEMENTATION)
    if scale is not None:
        scale_decoder(model, scale)
    return model


def _check_scale(
    model: Any, hf_config: dict[str, Any], parts: "dict[int, MoeModules]", options: SpreadOptions
) -> ResidualScale | None:
    """Find the scale of the residual, if ``options`` want one.

    Raise ValueError for a model without a common one.
    """
    if not options.scale_residual:
        return None
    if any(part.experts for part in parts.values()):
        raise ValueError(
            "scale_residual=True: routers and shared experts are scaled, too; add whole_block=True"
        )
    arch = find(hf_config)
    scales = {scale_layer_output(layer_config(arch, hf_config, n))[1] for n in parts}
    if len(scales) > 1:
        factors = sorted(scale.factor for scale in scales)
        raise ValueError(
            f"scale_residual=True: layers have different scaling factors {factors}; use bfloat16"
        )
    for layer in model.base_model.layers:
        check_parts(layer)
    return scales.pop()


def expert_layers(model: torch.nn.Module) -> tuple[Layer, ...]:
    """List the layers of ``model`` that are spread, in the order in which its forward calls them."""
    found: list[Layer] = []
    for module in model.modules():
        layer = module if isinstance(module, BlockLayer) else getattr(module, ATTRIBUTE, None)
        if layer is not None:
            found.append(layer)
    return tuple(found)


def serve_other_ranks(model: torch.nn.Module) -> None:
    """Take part in a forward of the other ranks without tokens of this rank's own. Collective.

    Raises ValueError for a model that is not spread yet.
    """
    layers = expert_layers(model)
    if not layers:
        raise ValueError(
            f"{type(model).__name__} is not spread over ranks; call parallelize(model, grid) before a rank "
            "joins"
        )
    for layer in layers:
        layer.join()


@dataclass(frozen=True)
class MoeModules:
    """The modules of a model that a layer replaces; ``experts``: only the experts of a block.

    The layer takes the place of the first module; its output includes that of the others.
    """

    names: tuple[str, ...]
    modules: tuple[torch.nn.Module, ...]
    experts: bool

    @property
    def parameters(self) -> tuple[str, ...]:
        """What the names of the parameters begin with that the layer loads itself.

        A norm inside an experts module is not among them.
        """
        if self.experts:
            return tuple(
                f"{self.names[0]}.{name}" for name, _ in self.modules[0].named_parameters(recurse=False)
            )
        return tuple(f"{name}." for name in self.names)


def moe_modules(
    model: torch.nn.Module, hf_config: dict[str, Any], whole_block: bool
) -> dict[int, MoeModules]:
    """Find the modules that each layer is to replace, by the layer's index.

    These are the experts modules, if the model lets its experts be provided. Otherwise, and with
    ``whole_block``, they are the modules of the whole block: router, experts and shared experts.

    Raises:
        CheckpointError: The family's layers can be computed, but not its whole models.
    """
    experts = {} if whole_block else experts_modules(model)
    if experts:
        return {n: MoeModules((name,), (model.get_submodule(name),), True) for n, name in experts.items()}
    if not is_known(hf_config):
        raise CheckpointError(
            f"model_type={hf_config.get('model_type')!r}: xpar has no schema of its blocks, only of those of "
            f"{', '.join(arch.model_type for arch in ARCHITECTURES)}; leave whole_block (--whole-block) out"
        )
    arch = find(hf_config)
    if why := arch.why_layers_only:
        raise CheckpointError(f"model_type={arch.model_type!r}: {why}; xpar run computes its layers")
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
    layers: dict[int, Layer] = {}
    for n, part in parts.items():
        if part.experts:
            config = describe_experts(model, part.names[0])
            layers[n] = build_moe_modules(
                config, grid, model.dtype, n, rows_of(part.modules[0], config), options
            )
        else:
            weights = weights_of(model, hf_config, part.names)
            layers[n] = build_block(weights, n, grid, model.dtype, options.of_layer(), options.scale_residual)
    return layers


def rows_of(module: Any, config: LayerConfig) -> ReadLayer:
    """Make the reader of a module's stacked experts, in any of transformers' layouts."""
    names = module_names(module)
    weights = InMemoryCheckpoint({}, dict(module.named_parameters()))
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
