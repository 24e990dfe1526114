"""A whole layer without any parallelism: the definition that every other way of computing it is checked against.

Routing is decided as the engine decides it, in the dtypes of the model; all else is float32. Experts are read one at
a time, and only those that some token chose, so that a layer of any size can be verified.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from xpar.engine.architectures import find, layer_config
from xpar.engine.checkpoint import Checkpoint
from xpar.engine.weights import SharedWeights, load_router, load_shared, make_router, stream_experts
from xpar.kernels.activations import activate
from xpar.kernels.contracts import Activation, Routing


def layer_reference(
    checkpoint: Checkpoint, layer: int, hidden_states: Tensor, dtype: torch.dtype | None = None
) -> tuple[Tensor, Routing]:
    """Output [T, H] float32 of MoE layer ``layer`` for ``hidden_states`` [T, H], and the routing behind it.

    ``dtype``: the model's dtype, to which weights are rounded before use; default that of ``hidden_states``.
    """
    dtype = hidden_states.dtype if dtype is None else dtype
    arch = find(checkpoint.config)
    config = layer_config(arch, checkpoint.config, layer)
    router = make_router(load_router(checkpoint, arch, layer, config, dtype), config)
    routing = router.route(hidden_states.to(dtype))

    chosen = chosen_experts(routing)
    experts = (
        (chosen[index], gate_up, down)
        for index, gate_up, down in stream_experts(checkpoint, arch, layer, config, chosen, dtype)
    )
    shared = load_shared(checkpoint, arch, layer, config, dtype)
    return sum_reference(hidden_states.to(dtype), routing, experts, shared, config.activation), routing


def chosen_experts(routing: Routing) -> list[int]:
    """The experts that some token goes to, ascending."""
    return sorted(set(routing.topk_ids.flatten().tolist()) - {-1})


def sum_reference(
    hidden_states: Tensor,
    routing: Routing,
    experts: Iterable[tuple[int, Tensor, Tensor]],
    shared: SharedWeights | None,
    activation: Activation,
) -> Tensor:
    """Weighted experts plus shared experts of ``hidden_states`` [T, H], in float32; ``experts``: (id, gate_up, down)."""
    x = hidden_states.float()
    out = torch.zeros_like(x)
    for expert, gate_up, down in experts:
        tokens, slots = (routing.topk_ids == expert).nonzero(as_tuple=True)
        y = mlp_reference(x[tokens], gate_up, down, activation)
        out.index_add_(0, tokens, y * routing.topk_weights[tokens, slots, None])
    if shared is not None:
        y = mlp_reference(x, shared.gate_up, shared.down, activation)
        out += y if shared.gate is None else y * torch.sigmoid(x @ shared.gate.float().T)
    return out


def mlp_reference(x: Tensor, gate_up: Tensor, down: Tensor, activation: Activation) -> Tensor:
    """``act(x @ gate_up.T) @ down.T`` in float32: [T, H], [2I, H], [H, I] -> [T, H]."""
    return activate(x @ gate_up.float().T, activation) @ down.float().T
