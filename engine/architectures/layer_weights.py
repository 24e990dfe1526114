"""One rank's share of a layer's weights, read from a checkpoint one tensor at a time.

Experts are streamed through one set of buffers into the kernel that will keep them, so that no second copy of a
layer ever exists. H hidden size, E experts, I expert width, Is width of the shared experts; ``rows`` is this rank's
part of I (of Is) under tensor parallelism, I_r (Is_r) wide.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from xpar.engine.architectures.mlp_weights import (
    ALL,
    MlpPlace,
    MlpTensors,
    load_table,
    load_tensor,
    mlp_buffers,
    read_mlp,
)
from xpar.engine.architectures.schema import Architecture
from xpar.engine.architectures.stored_names import resolve_names
from xpar.engine.checkpoint.reader import Checkpoint
from xpar.engine.config import LayerConfig
from xpar.engine.routing.router import FusedGateRouter, Router

Sink = Callable[..., None]


T = TypeVar("T", "RouterWeights", "SharedWeights", "LatentWeights", "NormWeights")


@dataclass(frozen=True)
class RouterWeights:
    """``gate`` [E, H] and ``gate_bias`` [E] in the gate's dtype, ``correction_bias`` [E] float32; biases or None.

    ``expert_scale`` [E] float32 and ``hash_table`` [vocabulary, k] int64: where the router has them.
    """

    gate: Tensor
    correction_bias: Tensor | None
    gate_bias: Tensor | None = None
    expert_scale: Tensor | None = None
    hash_table: Tensor | None = None


@dataclass(frozen=True)
class SharedWeights:
    """``gate_up`` packed rows, ``down`` [H, Is_r], ``gate`` [1, H] of their sigmoid or None."""

    gate_up: Tensor
    down: Tensor
    gate: Tensor | None


@dataclass(frozen=True)
class LatentWeights:
    """``enter`` [L, H] and ``leave`` [H, L], around the routed experts."""

    enter: Tensor
    leave: Tensor


@dataclass(frozen=True)
class NormWeights:
    """``scale`` [H] of the routed experts' norm."""

    scale: Tensor


@dataclass(frozen=True)
class LayerWeights:
    """What a rank keeps of a layer besides its experts, which went to the sink. ``output_bias``: [H] or None."""

    router: RouterWeights
    shared: SharedWeights | None
    output_bias: Tensor | None = None
    latent: LatentWeights | None = None
    norm: NormWeights | None = None

    def to(self, device: torch.device) -> "LayerWeights":
        """The same on ``device``."""
        return LayerWeights(
            _moved(self.router, device),
            None if self.shared is None else _moved(self.shared, device),
            _on(self.output_bias, device),
            None if self.latent is None else _moved(self.latent, device),
            None if self.norm is None else _moved(self.norm, device),
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
    rows: slice = ALL,
    shared_rows: slice = ALL,
) -> LayerWeights:
    """Load a rank's share of layer ``layer``, as ``dtype``.

    ``experts``: global ids, in the order of their local indices. ``sink(local index, gate_up, down)``, and if
    ``config.bias`` also (gate_up_bias, down_bias), takes each expert as :meth:`ExpertKernel.load_expert` does, and must
    not keep the tensors. Raises :class:`CheckpointError` for tensors that are missing, of another shape, quantised, or
    not finite.
    """
    weights = LayerWeights(
        load_router(checkpoint, arch, layer, config, dtype),
        load_shared(checkpoint, arch, layer, config, dtype, shared_rows),
        load_output_bias(checkpoint, arch, layer, config, dtype),
        load_latent(checkpoint, arch, layer, config, dtype),
        load_norm(checkpoint, arch, layer, config),
    )
    for index, expert in stream_experts(checkpoint, arch, layer, config, experts, dtype, rows):
        sink(index, *(tensor for tensor in expert if tensor is not None))
    return weights


def load_router(
    checkpoint: Checkpoint, arch: Architecture, layer: int, config: LayerConfig, dtype: torch.dtype
) -> RouterWeights:
    """The gate weight, and the biases and the table that the family has for this layer."""
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
        # Choices hang on small differences of this bias; families keep it in float32 whatever the model's dtype.
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
    rows: slice = ALL,
) -> SharedWeights | None:
    """The shared experts as one MLP, ``rows`` of its width; None where the layer has none."""
    arch = resolve_names(checkpoint, arch, layer)
    if config.shared is None or arch.shared is None:
        return None
    hidden = config.hidden_size
    place = MlpPlace(arch.shared.names, layer, hidden, config.shared.intermediate_size, rows)
    mlp = mlp_buffers(place, dtype)
    read_mlp(checkpoint, place, mlp)
    gate = None
    if arch.shared.gate is not None:
        gate = load_tensor(checkpoint, arch.shared.gate.format(layer=layer), (1, hidden), dtype)
    return SharedWeights(mlp.gate_up, mlp.down, gate)


def load_output_bias(
    checkpoint: Checkpoint, arch: Architecture, layer: int, config: LayerConfig, dtype: torch.dtype
) -> Tensor | None:
    """The bias [H] that is added once to every token's output, or None."""
    arch = resolve_names(checkpoint, arch, layer)
    if arch.output_bias is None:
        return None
    return load_tensor(checkpoint, arch.output_bias.format(layer=layer), (config.hidden_size,), dtype)


def load_latent(
    checkpoint: Checkpoint, arch: Architecture, layer: int, config: LayerConfig, dtype: torch.dtype
) -> LatentWeights | None:
    """The two products around the routed experts; None where those are as wide as the model."""
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
    """The scale of the norm before the routed experts, float32; None where they read the tokens as they are."""
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
    rows: slice = ALL,
) -> Iterator[tuple[int, MlpTensors]]:
    """Yield (position in ``experts``, tensors of that expert); the next step overwrites the tensors."""
    unknown = [e for e in experts if not 0 <= e < config.num_experts]
    if unknown:
        raise ValueError(f"experts {unknown} of layer {layer}: ids are 0 to {config.num_experts - 1}")
    arch = resolve_names(checkpoint, arch, layer)
    place = MlpPlace(
        arch.experts,
        layer,
        config.routed_size,
        config.intermediate_size,
        rows,
        experts=config.num_experts,
        spare=config.router.zero_experts,
    )
    out = mlp_buffers(place, dtype)
    for index, expert in enumerate(experts):
        read_mlp(checkpoint, replace(place, expert=expert), out)
        yield index, out


def _moved(weights: T, device: torch.device) -> T:
    there: dict[str, Any] = {name: _on(tensor, device) for name, tensor in vars(weights).items()}
    return replace(weights, **there)


def _on(tensor: Tensor | None, device: torch.device) -> Tensor | None:
    return None if tensor is None else tensor.to(device)


def make_router(
    weights: RouterWeights,
    config: LayerConfig,
    row_invariant: bool = False,
    check_finite: bool = True,
    shared_gate: Tensor | None = None,
) -> Router:
    """The layer's router with its weights. ``shared_gate`` [1, H]: a gate to make the logits of in the same product."""
    extras: dict[str, Any] = {
        "expert_scale": weights.expert_scale,
        "hash_table": weights.hash_table,
        "row_invariant": row_invariant,
        "check_finite": check_finite,
    }
    gate, bias = weights.gate, weights.correction_bias
    if shared_gate is not None and _one_product(config, weights, shared_gate):
        return FusedGateRouter(config.router, gate, shared_gate, bias, **extras)
    return Router(config.router, gate, bias, gate_bias=weights.gate_bias, **extras)


def _one_product(config: LayerConfig, weights: RouterWeights, shared_gate: Tensor) -> bool:
    """Whether the two gates multiply in one dtype, without a bias."""
    alike = weights.gate.dtype == shared_gate.dtype and config.router.logits_dtype == "model"
    return alike and weights.gate_bias is None
