"""What the experts compute, by definition: fp32, one expert at a time, nothing clever."""

from collections.abc import Sequence

import torch
from torch import Tensor

from xpar.kernels.activations import activate
from xpar.kernels.contracts import Activation


def expert_slots(
    hidden_states: Tensor,
    topk_ids: Tensor,
    gate_up: Tensor | Sequence[Tensor],
    down: Tensor | Sequence[Tensor],
    activation: Activation,
    gate_up_bias: Tensor | Sequence[Tensor] | None = None,
    down_bias: Tensor | Sequence[Tensor] | None = None,
) -> Tensor:
    """Every slot's expert output, unweighted: [T, k, H] float32; zero where ``topk_ids`` is -1.

    ``hidden_states`` [T, H] and the weights ``gate_up`` [E, 2I, H] (gate rows, then up rows; [E, I, H] without a
    gate), ``down`` [E, H, I] may have any floating dtype, as may the biases [E, 2I], [E, H]; all arithmetic is
    float32.
    """
    slots = torch.zeros(*topk_ids.shape, hidden_states.shape[1], device=hidden_states.device)
    for expert in range(len(gate_up)):
        token, slot = torch.where(topk_ids == expert)
        if token.numel():
            packed = hidden_states[token].float() @ gate_up[expert].float().T
            if gate_up_bias is not None:
                packed += gate_up_bias[expert].float()
            y = activate(packed, activation) @ down[expert].float().T
            slots[token, slot] = y if down_bias is None else y + down_bias[expert].float()
    return slots


def routed_experts(
    hidden_states: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    gate_up: Tensor | Sequence[Tensor],
    down: Tensor | Sequence[Tensor],
    activation: Activation,
    gate_up_bias: Tensor | Sequence[Tensor] | None = None,
    down_bias: Tensor | Sequence[Tensor] | None = None,
) -> Tensor:
    """``sum over slots of topk_weights * (down(act(gate_up(x) + bias)) + bias)``: [T, H] float32.

    ``topk_weights`` [T, k] float32; a slot whose id is -1 adds nothing, whatever its weight holds.
    """
    slots = expert_slots(hidden_states, topk_ids, gate_up, down, activation, gate_up_bias, down_bias)
    weights = topk_weights.float().masked_fill(topk_ids < 0, 0.0)
    return (slots * weights[..., None]).sum(1)
