"""Builds a layer from a checkpoint: placement, dispatcher, kernel, weights.

All ranks agree before any work is done.
"""

import logging
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from xpar.comm.failure import agreed
from xpar.comm.grid import ProcessGrid
from xpar.comm.reduction import Full
from xpar.engine.architectures.layer_config import find
from xpar.engine.architectures.layer_weights import (
    LayerWeights,
    SharedWeights,
    experts_format,
    load_layer_weights,
    make_router,
)
from xpar.engine.architectures.quantised_layers import open_layers
from xpar.engine.config import LayerConfig
from xpar.engine.formats.quantised_on_load import QuantisedOnLoad, relative_errors
from xpar.engine.layer.checkpoint_config import FIELDS, allocation_errors, config_errors, read_layer_config
from xpar.engine.layer.expert_shard import (
    ExpertShard,
    build_expert_shard,
    slice_expert_width,
)
from xpar.engine.layer.fused_shared_experts import (
    SharedSlots,
    check_fusable,
    count_shared_slots,
    experts_of_shared,
    home_rank,
)
from xpar.engine.layer.latent import ExpertInputProjection, LatentProjection, NormProjection
from xpar.engine.layer.options import DEFAULT, LayerOptions
from xpar.engine.layer.route_and_compute import choose_runner
from xpar.engine.layer.runner import MoERunner
from xpar.engine.layer.shared_expert_overlap import SharedOrder
from xpar.engine.layer.shared_experts import build_shared_experts, slice_shared_width, state_of_shared
from xpar.engine.layer.token_split import KeepAllTokens, choose_token_split
from xpar.kernels.contracts import ExpertKernel, QuantisedKernel
from xpar.kernels.gpu.availability import use_table
from xpar.kernels.quantised_weight import WeightFormat

log = logging.getLogger("xpar.build")
FLOATS = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
"""The dtypes that a layer can compute in, by name."""


def load_layer(
    path: str | Path,
    layer: int,
    grid: ProcessGrid,
    dtype: torch.dtype | None = None,
    options: LayerOptions = DEFAULT,
) -> MoERunner:
    """Load layer ``layer`` of a Hugging Face checkpoint, this rank's experts only; collective over the grid.

    Args:
        path: The checkpoint's directory.
        layer: The layer's number in the model.
        grid: The process grid.
        dtype: The dtype that the layer computes in; by default the checkpoint's.
        options: How the layer is computed.

    Raises:
        AgreedError: A checkpoint, layer, dispatcher, kernel or tile file that does not fit; the same on every
            rank.

    Example:
        >>> grid = ProcessGrid.create(World.attach(allow_singleton=True))
        >>> layer = load_layer(checkpoint, 0, grid, torch.float32)
        >>> layer(torch.zeros(3, layer.config.hidden_size)).shape[0]
        3
    """
    return agreed(grid.world.comm, lambda: _load(path, layer, grid, dtype, options))


def _load(
    path: str | Path, layer: int, grid: ProcessGrid, dtype: torch.dtype | None, options: LayerOptions
) -> MoERunner:
    with open_layers(path, options.quantisation) as checkpoint:
        config = read_layer_config(checkpoint, layer)
        arch = find(checkpoint.config)
        read = partial(load_layer_weights, checkpoint, arch, layer, config)
        begin = time.perf_counter()
        sizes = ", ".join(f"{name}={getattr(config, name)}" for name in FIELDS[:3])
        with config_errors(checkpoint), allocation_errors(layer, f"config.json: {sizes}"):
            stored = experts_format(checkpoint, arch, layer, config, slice_expert_width(config, grid))
            runner = build_layer(config, grid, dtype or checkpoint.dtype, read, options, layer, stored)
        log.info(
            "layer %d: experts %s in %s, %.1f MB read in %.2f s",
            layer,
            runner.experts.expert_ids,
            runner.experts.kernel_name,
            checkpoint.bytes_read / 1e6,
            time.perf_counter() - begin,
        )
        if conversions := checkpoint.describe_conversions(runner.dtype):
            log.info("layer %d: quantised weights are converted: %s", layer, conversions)
        if isinstance(checkpoint, QuantisedOnLoad):
            error, _ = relative_errors([checkpoint.squares])
            log.info("layer %d: quantised to %s, relative error %.1e", layer, options.quantisation, error)
        return runner


def build_layer(
    config: LayerConfig,
    grid: ProcessGrid,
    dtype: torch.dtype,
    read: Callable[..., LayerWeights],
    options: LayerOptions = DEFAULT,
    layer: int = 0,
    weight_format: WeightFormat | None = None,
) -> MoERunner:
    """Build a layer whose weights come from ``read``; makes no collective call.

    Args:
        config: The layer.
        grid: The process grid.
        dtype: The dtype that the layer computes in.
        read: Returns the weights; it takes the keyword arguments of :func:`load_layer_weights`, and if
            ``weight_format`` is given also ``as_codes``: True if ``sink`` takes the experts as
            :class:`~xpar.kernels.quantised_weight.QuantisedWeight`.
        options: How the layer is computed.
        layer: The layer's number, for messages.
        weight_format: The format in which the routed experts are stored; None for plain numbers.

    Raises:
        ValueError: The options do not fit the grid, the layer or this machine.
    """
    exact, slots = options.exact, _shared_slots(config, options)
    experts = build_expert_shard(
        config, grid, dtype, options, options.sequence_parallel, slots, weight_format
    )
    if experts.kernel is not None and options.tiles is not None:
        use_table(experts.kernel, options.tiles)
    shared_state = Full() if slots else state_of_shared(grid, options)
    weights = read(
        experts=experts.experts,
        sink=_sink(experts.kernel),
        dtype=dtype,
        width_slice=experts.width_slice,
        shared_slice=slice_shared_width(config, shared_state),
        **({} if weight_format is None else {"as_codes": experts.weight_format is not None}),
    )
    weights = weights.to(grid.device)
    shared = fused = None
    if weights.shared is not None and slots:
        fused = _fused(config, experts, weights.shared, slots, exact)
    elif weights.shared is not None:
        shared = build_shared_experts(config, grid, weights.shared, dtype, exact, shared_state)
    on_host = grid.device.type == "cpu"
    # Looking at every logit would make the host wait for the GPU in every layer.
    router = make_router(
        weights.router,
        config,
        row_invariant=exact,
        check_finite=on_host,
        shared_gate=_gate_beside_router(grid, experts, weights.shared, options),
    )
    return choose_runner(config, experts, options)(
        config,
        grid,
        router,
        experts,
        dtype=dtype,
        shared=shared,
        fused=fused,
        output_bias=weights.output_bias,
        projection=_projection(config, weights, exact),
        options=options,
        layer=layer,
    )


def with_options(runner: MoERunner, **changes: Any) -> MoERunner:
    """Return the same layer, with the same weights, under other ``shared_order`` or ``depth``.

    Raises ValueError for another option: it would need other weights, or another dispatcher.
    """
    if fixed := sorted(set(changes) - {"shared_order", "depth"}):
        raise ValueError(
            f"{', '.join(fixed)}: of a layer that is built only shared_order and depth can change"
        )
    options = replace(runner.options, **changes)
    return choose_runner(runner.config, runner.experts, options)(
        runner.config,
        runner.grid,
        runner.router,
        runner.experts,
        dtype=runner.dtype,
        shared=runner.shared,
        fused=runner.fused,
        output_bias=runner.output_bias,
        projection=runner.projection,
        options=options,
        layer=runner.layer,
    )


def _projection(config: LayerConfig, weights: LayerWeights, exact: bool) -> ExpertInputProjection | None:
    """Build what makes the experts' input of the tokens; None where the experts read the tokens."""
    if weights.norm is not None and config.router.norm_eps is not None:
        if exact:
            raise ValueError(
                "exact mode with norms inside the layer: a row's sum of squares may depend on the rest of "
                "the batch; leave exact out"
            )
        return NormProjection(weights.norm.scale, config.router.norm_eps)
    return (
        None
        if weights.latent is None
        else LatentProjection(weights.latent.enter, weights.latent.leave, exact)
    )


def _shared_slots(config: LayerConfig, options: LayerOptions) -> int:
    """Count the slots that the shared experts take in the routed product: 0 unless that was asked for."""
    if not options.fuse_shared_experts:
        return 0
    if options.shared_order is not SharedOrder.AUTO:
        raise ValueError(
            f"fuse_shared_experts with shared_order={options.shared_order.value!r}: fused ones have no order "
            "of their own, they compute with the routed experts; leave it at auto"
        )
    return count_shared_slots(config)


def _fused(
    config: LayerConfig, experts: ExpertShard, weights: SharedWeights, count: int, exact: bool
) -> SharedSlots:
    """Load the copies of the shared experts into the kernel, each copy as wide as a routed expert."""
    assert config.shared is not None and experts.kernel is not None  # there are slots to compute
    placement = experts.dispatcher.placement
    check_fusable(experts.dispatcher, placement.etp)
    parts = experts_of_shared(weights, config.activation.gated, config.intermediate_size, experts.width_slice)
    for index, (gate_up, down) in enumerate(parts):
        experts.kernel.load_expert(len(experts.experts) + index, gate_up, down)
    home, scale = home_rank(experts.dispatcher), config.shared.scale
    return SharedSlots(placement.num_experts, count, placement.ep, home, weights.gate, scale, exact)


def _gate_beside_router(
    grid: ProcessGrid, experts: ExpertShard, shared: SharedWeights | None, options: LayerOptions
) -> Tensor | None:
    """Return the shared gate if one product with the router's gate serves the same tokens, else None.

    In exact mode the logits would depend on the product's shape, and so on the grid: None.
    """
    if shared is None or options.exact:
        return None
    tokens = choose_token_split(grid, experts.dispatcher, options.sequence_parallel)
    return shared.gate if options.fuse_shared_experts or isinstance(tokens, KeepAllTokens) else None


def _sink(kernel: ExpertKernel | None) -> Callable[..., None]:
    """Return what takes the weights of each expert."""
    if kernel is None:
        return _no_expert
    if kernel.spec.weight_format is None:
        return kernel.load_expert
    return cast(QuantisedKernel, kernel).load_quantised


def _no_expert(index: int, *tensors: torch.Tensor) -> None:
    raise AssertionError(f"expert {index} came to a rank that holds none")
