"""What the experts compute, by definition: fp32, one expert at a time, nothing clever."""

import torch
from torch import Tensor

from xpar.kernels.activations import gated
from xpar.kernels.contracts import Activation


def expert_slots(
    hidden_states: Tensor, topk_ids: Tensor, gate_up: Tensor, down: Tensor, activation: Activation
) -> Tensor:
    """Every slot's expert output, unweighted: [T, k, H] float32; zero where ``topk_ids`` is -1.

    ``hidden_states`` [T, H] and the weights ``gate_up`` [E, 2I, H] (gate rows, then up rows), ``down`` [E, H, I]
    may have any floating dtype; all arithmetic is float32.
    """
    slots = torch.zeros(*topk_ids.shape, hidden_states.shape[1], device=hidden_states.device)
    for expert in range(gate_up.shape[0]):
        token, slot = torch.where(topk_ids == expert)
        if token.numel():
            packed = hidden_states[token].float() @ gate_up[expert].float().T
            slots[token, slot] = gated(packed, activation) @ down[expert].float().T
    return slots


def routed_experts(
    hidden_states: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    gate_up: Tensor,
    down: Tensor,
    activation: Activation,
) -> Tensor:
    """``sum over slots of topk_weights * down(act(gate(x)) * up(x))``: [T, H] float32.

    ``topk_weights`` [T, k] float32; a slot whose id is -1 adds nothing, whatever its weight holds.
    """
    slots = expert_slots(hidden_states, topk_ids, gate_up, down, activation)
    weights = topk_weights.float().masked_fill(topk_ids < 0, 0.0)
    return (slots * weights[..., None]).sum(1)
