"""One rank's part of a layer's weights, read from a checkpoint one tensor at a time.

Experts are streamed through one set of buffers into the kernel that keeps them, so that no second copy of a
layer exists. Is is the width of the shared experts. Where ranks slice them, ``width_slice`` is this rank's
part of I or of Is, and I_r or Is_r is the width of that part.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from xpar.engine.architectures.layer_config import layer_config
from xpar.engine.architectures.mlp_weights import (
    ALL,
    MlpPlace,
    MlpTensors,
    load_table,
    load_tensor,
    mlp_buffers,
    read_mlp,
)
from xpar.engine.architectures.quantised_mlp import as_stored, quantised_format, stream_quantised
from xpar.engine.architectures.schema import Architecture
from xpar.engine.architectures.stored_names import resolve_names
from xpar.engine.checkpoint.reader import Checkpoint
from xpar.engine.config import LayerConfig
from xpar.engine.routing.router import FusedGateRouter, Router
from xpar.kernels.quantised_weight import WeightFormat

Sink = Callable[..., None]
"""Takes (local index, gate_up, down) of an expert, followed by (gate_up_bias, down_bias) if it has biases."""
Weights = TypeVar("Weights", "RouterWeights", "SharedWeights", "LatentWeights", "NormWeights")


@dataclass(frozen=True)
class RouterWeights:
    """The weights of a router; those that a family does not have are None.

    ``gate`` [E, H] and ``gate_bias`` [E] have the gate's dtype. ``correction_bias`` [E] and ``expert_scale``
    [E] are float32, ``hash_table`` [vocabulary, k] is int64.
    """

    gate: Tensor
    correction_bias: Tensor | None
    gate_bias: Tensor | None = None
    expert_scale: Tensor | None = None
    hash_table: Tensor | None = None


@dataclass(frozen=True)
class SharedWeights:
    """The shared experts as one MLP.

    ``gate_up`` has packed rows [2 Is_r, H], ``down`` is [H, Is_r], and ``gate`` is the sigmoid gate [1, H] or
    None.
    """

    gate_up: Tensor
    down: Tensor
    gate: Tensor | None


@dataclass(frozen=True)
class LatentWeights:
    """The projections ``enter`` [L, H] and ``leave`` [H, L] around the routed experts."""

    enter: Tensor
    leave: Tensor


@dataclass(frozen=True)
class NormWeights:
    """The ``scale`` [H] of the norm before the routed experts."""

    scale: Tensor


@dataclass(frozen=True)
class LayerWeights:
    """The weights of a layer besides its routed experts. ``output_bias`` is [H] or None."""

    router: RouterWeights
    shared: SharedWeights | None
    output_bias: Tensor | None = None
    latent: LatentWeights | None = None
    norm: NormWeights | None = None

    def to(self, device: torch.device) -> "LayerWeights":
        """Return the same weights on ``device``."""
        return LayerWeights(
            _to_device(self.router, device),
            None if self.shared is None else _to_device(self.shared, device),
            _tensor_to(self.output_bias, device),
            None if self.latent is None else _to_device(self.latent, device),
            None if self.norm is None else _to_device(self.norm, device),
        )


def load_layer_weights(
    checkpoint: Checkpoint,
    arch: Architecture,
    layer: int,
    config: LayerConfig,
    *,
    experts: Sequence[int],
    sink: Sink,
    dtype: torch.dtype,
    width_slice: slice = ALL,
    shared_slice: slice = ALL,
    as_codes: bool = False,
) -> LayerWeights:
    """Load a rank's part of layer ``layer``.

    Args:
        checkpoint: the open checkpoint.
        arch: its family.
        layer: index of the layer.
        config: configuration of the layer.
        experts: global ids of this rank's experts, in the order of their local indices.
        sink: takes the tensors of each expert, as :meth:`ExpertKernel.load_expert` does, and must not keep
            them. Biases are among them if ``config.bias``.
        dtype: dtype of the tensors.
        width_slice: this rank's slice of I.
        shared_slice: this rank's slice of Is.
        as_codes: True if ``sink`` takes codes and scales as :meth:`QuantisedKernel.load_quantised` does, in
            the :func:`experts_format` of the layer.

    Raises:
        CheckpointError: a tensor is missing, has another shape or is not finite.
    """
    weights = LayerWeights(
        load_router(checkpoint, arch, layer, config, dtype),
        load_shared(checkpoint, arch, layer, config, dtype, shared_slice),
        load_output_bias(checkpoint, arch, layer, config, dtype),
        load_latent(checkpoint, arch, layer, config, dtype),
        load_norm(checkpoint, arch, layer, config),
    )
    if as_codes:
        place = _expert_place(checkpoint, arch, layer, config, width_slice)
        weight_format = quantised_format(checkpoint, place)
        assert weight_format is not None  # the caller has asked
        for index, quantised in stream_quantised(checkpoint, place, weight_format, experts, dtype):
            sink(index, *(tensor for tensor in quantised if tensor is not None))
        return weights
    for index, expert in stream_experts(checkpoint, arch, layer, config, experts, dtype, width_slice):
        sink(index, *(tensor for tensor in expert if tensor is not None))
    return weights


def experts_format(
    checkpoint: Checkpoint, arch: Architecture, layer: int, config: LayerConfig, width_slice: slice
) -> WeightFormat | None:
    """Return the format in which the routed experts' slices ``width_slice`` can stay; None for floats."""
    return quantised_format(checkpoint, _expert_place(checkpoint, arch, layer, config, width_slice))


def stored_layer_config(checkpoint: Checkpoint, arch: Architecture, layer: int) -> LayerConfig:
    """Make the configuration of a layer with what the stored form of its experts adds to it.

    Experts are sliced at the blocks of their weights, and their inputs may be quantised.

    Raises :class:`CheckpointError` as :func:`layer_config` does, and for quantised experts that are damaged.
    """
    names = resolve_names(checkpoint, arch, layer).experts
    return as_stored(layer_config(arch, checkpoint.config, layer), checkpoint, names, layer)


def load_router(
    checkpoint: Checkpoint, arch: Architecture, layer: int, config: LayerConfig, dtype: torch.dtype
) -> RouterWeights:
    """Load the gate, and the biases, the scale and the table that the layer has."""
    arch = resolve_names(checkpoint, arch, layer)
    experts, hidden = config.num_logits, config.hidden_size
    gate_dtype = torch.float32 if arch.gate_dtype == "float32" else dtype
    gate = load_tensor(checkpoint, arch.gate.format(layer=layer), (experts, hidden), gate_dtype)
    gate_bias = correction = table = scale = None
    if arch.norm is not None:
        factor = load_tensor(checkpoint, arch.norm.gate_scale.format(layer=layer), (hidden,), torch.float32)
        gate = (gate.float() * factor * hidden**-0.5).to(gate_dtype)
    if arch.expert_scale is not None:
        scale = load_tensor(checkpoint, arch.expert_scale.format(layer=layer), (experts,), torch.float32)
    if arch.gate_bias is not None:
        gate_bias = load_tensor(checkpoint, arch.gate_bias.format(layer=layer), (experts,), gate_dtype)
    if arch.hash_routing is not None and config.router.choice == "hash":
        table = load_table(
            checkpoint,
            arch.hash_routing.table.format(layer=layer),
            (config.router.vocabulary, config.router.top_k),
            config.num_experts,
        )
    if arch.correction_bias is not None and config.router.correction_bias:
        shape = (1, experts) if arch.correction_bias_is_row else (experts,)
        # Choices hang on small differences of this bias; families keep it in float32 whatever the model's
        # dtype.
        correction = load_tensor(
            checkpoint, arch.correction_bias.format(layer=layer), shape, torch.float32
        ).view(experts)
    return RouterWeights(gate, correction, gate_bias, scale, table)


def load_shared(
    checkpoint: Checkpoint,
    arch: Architecture,
    layer: int,
    config: LayerConfig,
    dtype: torch.dtype,
    width_slice: slice = ALL,
) -> SharedWeights | None:
    """Load slice ``width_slice`` of the shared experts; None for a layer without any."""
    arch = resolve_names(checkpoint, arch, layer)
    if config.shared is None or arch.shared is None:
        return None
    hidden = config.hidden_size
    place = MlpPlace(arch.shared.names, layer, hidden, config.shared.intermediate_size, width_slice)
    mlp = mlp_buffers(place, dtype)
    read_mlp(checkpoint, place, mlp)
    gate = None
    if arch.shared.gate is not None:
        gate = load_tensor(checkpoint, arch.shared.gate.format(layer=layer), (1, hidden), dtype)
    return SharedWeights(mlp.gate_up, mlp.down, gate)


def load_output_bias(
    checkpoint: Checkpoint, arch: Architecture, layer: int, config: LayerConfig, dtype: torch.dtype
) -> Tensor | None:
    """Load the bias [H] that is added once to every token's output; None without that bias."""
    arch = resolve_names(checkpoint, arch, layer)
    if arch.output_bias is None:
        return None
    return load_tensor(checkpoint, arch.output_bias.format(layer=layer), (config.hidden_size,), dtype)


def load_latent(
    checkpoint: Checkpoint, arch: Architecture, layer: int, config: LayerConfig, dtype: torch.dtype
) -> LatentWeights | None:
    """Load the projections around the routed experts; None if these are as wide as the model."""
    arch = resolve_names(checkpoint, arch, layer)
    if arch.latent is None or config.latent_size is None:
        return None
    hidden, latent = config.hidden_size, config.latent_size
    return LatentWeights(
        load_tensor(checkpoint, arch.latent.enter.format(layer=layer), (latent, hidden), dtype),
        load_tensor(checkpoint, arch.latent.leave.format(layer=layer), (hidden, latent), dtype),
    )


def load_norm(
    checkpoint: Checkpoint, arch: Architecture, layer: int, config: LayerConfig
) -> NormWeights | None:
    """Load the float32 scale of the norm before the routed experts; None without that norm."""
    arch = resolve_names(checkpoint, arch, layer)
    if arch.norm is None:
        return None
    name = arch.norm.experts_scale.format(layer=layer)
    return NormWeights(load_tensor(checkpoint, name, (config.hidden_size,), torch.float32))


def stream_experts(
    checkpoint: Checkpoint,
    arch: Architecture,
    layer: int,
    config: LayerConfig,
    experts: Sequence[int],
    dtype: torch.dtype,
    width_slice: slice = ALL,
) -> Iterator[tuple[int, MlpTensors]]:
    """Yield (position in ``experts``, tensors of that expert).

    The next step overwrites the tensors. Raises ValueError for ids that the layer does not have.
    """
    unknown = [e for e in experts if not 0 <= e < config.num_experts]
    if unknown:
        raise ValueError(f"experts {unknown} of layer {layer}: ids are 0 to {config.num_experts - 1}")
    place = _expert_place(checkpoint, arch, layer, config, width_slice)
    out = mlp_buffers(place, dtype)
    for index, expert in enumerate(experts):
        read_mlp(checkpoint, replace(place, expert=expert), out)
        yield index, out


def _expert_place(
    checkpoint: Checkpoint, arch: Architecture, layer: int, config: LayerConfig, width_slice: slice
) -> MlpPlace:
    return MlpPlace(
        resolve_names(checkpoint, arch, layer).experts,
        layer,
        config.routed_size,
        config.intermediate_size,
        width_slice,
        experts=config.num_experts,
        spare=config.router.zero_experts,
    )


def _to_device(weights: Weights, device: torch.device) -> Weights:
    tensors: dict[str, Any] = {name: _tensor_to(tensor, device) for name, tensor in vars(weights).items()}
    return replace(weights, **tensors)


def _tensor_to(tensor: Tensor | None, device: torch.device) -> Tensor | None:
    return None if tensor is None else tensor.to(device)


def make_router(
    weights: RouterWeights,
    config: LayerConfig,
    row_invariant: bool = False,
    check_finite: bool = True,
    shared_gate: Tensor | None = None,
) -> Router:
    """Make the router of a layer.

    Args:
        weights: weights of the router.
        config: configuration of the layer.
        row_invariant: make the bits of a row's logits depend on that row alone.
        check_finite: raise an error for logits that are not finite.
        shared_gate: the gate [1, H] of the shared experts, whose logits the router's product makes too, if
            the two gates have one dtype and no bias.
    """
    extras: dict[str, Any] = {
        "expert_scale": weights.expert_scale,
        "hash_table": weights.hash_table,
        "row_invariant": row_invariant,
        "check_finite": check_finite,
    }
    gate, bias = weights.gate, weights.correction_bias
    if shared_gate is not None and _can_fuse_gates(config, weights, shared_gate):
        return FusedGateRouter(config.router, gate, shared_gate, bias, **extras)
    return Router(config.router, gate, bias, gate_bias=weights.gate_bias, **extras)


def _can_fuse_gates(config: LayerConfig, weights: RouterWeights, shared_gate: Tensor) -> bool:
    """Return whether one product can make the logits of both gates: one dtype, no bias."""
    is_same_dtype = weights.gate.dtype == shared_gate.dtype and config.router.logits_dtype == "model"
    return is_same_dtype and weights.gate_bias is None
