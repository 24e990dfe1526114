"""The reference of a whole layer, without any parallelism, against which all other ways are checked.

Routing is decided as the engine decides it, in the dtypes of the model; everything else is float32. Experts
are read one at a time, and only experts that some token chose, so that a layer of any size can be verified.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from xpar.engine.architectures.layer_config import find, layer_config
from xpar.engine.architectures.layer_weights import (
    LatentWeights,
    NormWeights,
    SharedWeights,
    load_latent,
    load_norm,
    load_output_bias,
    load_router,
    load_shared,
    make_router,
    stream_experts,
)
from xpar.engine.architectures.mlp_weights import MlpTensors
from xpar.engine.checkpoint.reader import Checkpoint
from xpar.engine.config import LayerConfig
from xpar.engine.layer.runner import MoERunner
from xpar.engine.routing import identity_output, weigh_input
from xpar.kernels.contracts import Routing
from xpar.kernels.quantised_rows import quantise_rows, quantised_mlp
from xpar.kernels.quantised_weight import ActivationScheme
from xpar.kernels.reference import mlp

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
"""The largest relative error of a whole layer against the reference, by the dtype it computes in."""


def relative_error(y: Tensor, reference: Tensor) -> float:
    """Compute ||y - ref|| / ||ref||."""
    return float((y.float() - reference).norm() / reference.norm().clamp_min(1e-30))


@dataclass(frozen=True)
class InputEmulation:
    """An expert whose inputs are quantised as a layer's kernels do.

    Attributes:
        scheme: How they are quantised.
        dtype: The dtype in which rows lie.
        is_whole: Whether the inputs of both products are, from codes of weights as they are stored; else
            only the rows that travel, which become ``dtype`` again before they are multiplied.
    """

    scheme: ActivationScheme
    dtype: torch.dtype
    is_whole: bool

    def __call__(self, x: Tensor, *weights: Any) -> Tensor:
        """Compute as :func:`~xpar.kernels.reference.mlp`, with its arguments."""
        x = x.to(self.dtype)
        if self.is_whole:
            return quantised_mlp(x, *weights, scheme=self.scheme)
        decoded = quantise_rows(x, self.scheme).dequantise(self.scheme.group)
        return mlp(decoded.to(self.dtype), *weights)


def layer_reference(
    checkpoint: Checkpoint,
    layer: int,
    hidden_states: Tensor,
    dtype: torch.dtype | None = None,
    input_ids: Tensor | None = None,
    emulation: InputEmulation | None = None,
) -> tuple[Tensor, Routing]:
    """Compute MoE layer ``layer`` of a checkpoint.

    Args:
        checkpoint: The checkpoint.
        layer: The layer's number.
        hidden_states: ``[T, H]``.
        dtype: The model's, to which weights are rounded before use; by default that of ``hidden_states``.
        input_ids: ``[T]`` token ids, for layers that route by token id.
        emulation: How inputs of routed experts are quantised, or None.

    Returns:
        The output ``[T, H]`` float32, and the routing behind it.
    """
    dtype = hidden_states.dtype if dtype is None else dtype
    arch = find(checkpoint.config)
    config = layer_config(arch, checkpoint.config, layer)
    router = make_router(load_router(checkpoint, arch, layer, config, dtype), config)
    routing = router.route(hidden_states.to(dtype), None, input_ids)

    chosen = chosen_experts(routing)
    # A value near the border of two codes becomes the other one with weights that are rounded.
    kept = torch.float32 if emulation is not None and emulation.is_whole else dtype
    experts = (
        (chosen[index], expert)
        for index, expert in stream_experts(checkpoint, arch, layer, config, chosen, kept)
    )
    shared = load_shared(checkpoint, arch, layer, config, dtype)
    bias = load_output_bias(checkpoint, arch, layer, config, dtype)
    latent = load_latent(checkpoint, arch, layer, config, dtype)
    x, norm = hidden_states.to(dtype), load_norm(checkpoint, arch, layer, config)
    weights = (shared, config, bias, latent, norm)
    return slot_order_sum_reference(x, routing, experts, *weights, compute=emulation or mlp), routing


def input_emulation(runner: MoERunner) -> InputEmulation | None:
    """Return what computes one expert as ``runner`` does; None where inputs stay as they are.

    Collective over the grid of ``runner``: a rank without experts does not know what kernels do.
    """
    form, gather = runner.experts.row_format, runner.grid.world.comm.all_gather_object
    if form is None:
        return None
    return InputEmulation(form.scheme, runner.dtype, any(gather(runner.experts.takes_codes)))


def chosen_experts(routing: Routing) -> list[int]:
    """Return the ids of the experts that some token goes to, in ascending order."""
    return sorted(set(routing.topk_ids.flatten().tolist()) - {-1})


def slot_order_sum_reference(
    hidden_states: Tensor,
    routing: Routing,
    experts: Iterable[tuple[int, MlpTensors]],
    shared: SharedWeights | None,
    config: LayerConfig,
    output_bias: Tensor | None = None,
    latent: LatentWeights | None = None,
    norm: NormWeights | None = None,
    *,
    compute: Callable[..., Tensor] = mlp,
) -> Tensor:
    """Add up a layer's output in float32: ``[T, H]``.

    ``experts``: (id, tensors) of each expert that some token goes to. The other arguments are those that the
    layer has, or None. ``compute`` computes one routed expert.
    """
    x = hidden_states.float()
    own = hidden_states if latent is None else x @ latent.enter.float().T
    if norm is not None and config.router.norm_eps is not None:
        own = x / (x.square().mean(-1, keepdim=True) + config.router.norm_eps).sqrt() * norm.scale
    rows, weighted = weigh_input(own, routing)
    rows = rows.float()
    out = torch.zeros_like(rows)
    for expert, tensors in experts:
        tokens, slots = (routing.topk_ids == expert).nonzero(as_tuple=True)
        y = compute(rows[tokens], config.activation, *tensors)
        out.index_add_(0, tokens, y * weighted.topk_weights[tokens, slots, None])
    out = out if latent is None else out @ latent.leave.float().T
    identity = identity_output(x, routing)
    out += 0.0 if identity is None else identity
    out += 0.0 if output_bias is None else output_bias.float()
    if shared is not None and config.shared is not None:
        y = mlp(x, config.activation, shared.gate_up, shared.down) * config.shared.scale
        out += y if shared.gate is None else y * torch.sigmoid(x @ shared.gate.float().T)
    return out
