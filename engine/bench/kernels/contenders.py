"""The contenders of the GPU kernels: other ways to compute the same layer on the same weights."""

import copy
from collections.abc import Callable
from types import SimpleNamespace

import torch
from torch import Tensor
from torch.nn import functional

from xpar.engine.bench.kernels.cases import Weights
from xpar.kernels.activations import activate
from xpar.kernels.contracts import Activation, ExpertInput, ExpertSpec
from xpar.kernels.gpu.default_tables import former_table
from xpar.kernels.gpu.experts import TritonExperts
from xpar.kernels.quantised_weight import QuantisedWeight

ComputeExperts = Callable[[ExpertInput], Tensor]
"""Computes the outputs [T, H] of a step."""
FORMER = "former"


def former_experts(kernel: TritonExperts) -> TritonExperts:
    """Return a kernel with the same weights and the tables of before, to time both in turn."""
    other = copy.copy(kernel)
    other.table = former_table(kernel.table)
    return other


def torch_grouped(spec: ExpertSpec, weights: Weights, has_dropped: bool) -> ComputeExperts:
    """Build torch's grouped products with all around them; ``has_dropped``: some slots have id -1."""
    product = getattr(functional, "grouped_mm", None) or torch._grouped_mm
    gate_up, down = weights.gate_up.transpose(1, 2), weights.down.transpose(1, 2)
    experts = spec.num_experts

    def compute(x: ExpertInput) -> Tensor:
        tokens, top_k = x.topk_ids.shape
        flat = x.topk_ids.reshape(-1)
        ids, order = torch.sort(flat.masked_fill(flat < 0, experts) if has_dropped else flat)
        ends = torch.histc(ids, bins=experts, min=0, max=experts - 1).cumsum(0, dtype=torch.int32)
        rows = x.hidden_states[order // top_k]
        packed = product(rows, gate_up, offs=ends)
        expert_of_row = ids.clamp(max=experts - 1) if has_dropped else ids
        if weights.biases:
            packed = packed + weights.biases[0][expert_of_row]
        y = product(activate(packed, spec.activation), down, offs=ends)
        if weights.biases:
            y = y + weights.biases[1][expert_of_row]
        slots = torch.empty_like(y)
        slots[order] = y
        if has_dropped:
            slots.masked_fill_((flat < 0)[:, None], 0.0)
        return torch.einsum("mkh,mk->mh", slots.view(tokens, top_k, -1), x.topk_weights.to(y.dtype))

    return compute


def transformers_grouped(spec: ExpertSpec, weights: Weights, has_dropped: bool) -> ComputeExperts:
    """Build transformers' own ``grouped_mm`` experts; raise ImportError if it has none."""
    from transformers.integrations.moe import grouped_mm_experts_forward

    module = SimpleNamespace(
        num_experts=spec.num_experts,
        gate_up_proj=weights.gate_up,
        down_proj=weights.down,
        gate_up_proj_bias=weights.biases[0] if weights.biases else None,
        down_proj_bias=weights.biases[1] if weights.biases else None,
        has_gate=True,
        has_bias=bool(weights.biases),
        has_post_expert_norm=False,
        is_transposed=False,
        is_concatenated=True,
        _is_expert_parallel=has_dropped,
        _apply_gate=lambda packed: _apply_gate(packed, spec.activation),
    )

    def compute(x: ExpertInput) -> Tensor:
        ids = x.topk_ids
        if has_dropped:
            ids = ids.masked_fill(ids < 0, spec.num_experts)
        result: Tensor = grouped_mm_experts_forward(module, x.hidden_states, ids.long(), x.topk_weights)
        return result

    return compute


def torch_scaled_grouped(
    spec: ExpertSpec,
    weights: list[tuple[QuantisedWeight, QuantisedWeight]],
    biases: tuple[Tensor, ...],
    has_dropped: bool,
) -> ComputeExperts:
    """Build torch's grouped products of e4m3 with a scale a row, around which torch quantises rows.

    The arguments are those of :func:`torch_grouped`, ``weights`` with a scale for each of their rows.
    """
    gate_up, down = (torch.stack([pair[n].codes for pair in weights]).transpose(1, 2) for n in range(2))
    scales = [torch.stack([pair[n].scales[:, 0].float() for pair in weights]) for n in range(2)]
    experts = spec.num_experts

    def quantise(rows: Tensor) -> tuple[Tensor, Tensor]:
        scale = rows.abs().amax(1).float().clamp(min=1e-20) / 448.0
        return (rows / scale[:, None]).to(torch.float8_e4m3fn), scale

    def product(rows: Tensor, n: int, ends: Tensor) -> Tensor:
        codes, scale = quantise(rows)
        result: Tensor = torch._scaled_grouped_mm(
            codes, (gate_up, down)[n], scale, scales[n], offs=ends, out_dtype=spec.dtype
        )
        return result

    def compute(x: ExpertInput) -> Tensor:
        tokens, top_k = x.topk_ids.shape
        flat = x.topk_ids.reshape(-1)
        ids, order = torch.sort(flat.masked_fill(flat < 0, experts) if has_dropped else flat)
        ends = torch.histc(ids, bins=experts, min=0, max=experts - 1).cumsum(0, dtype=torch.int32)
        expert_of_row = ids.clamp(max=experts - 1)
        packed = product(x.hidden_states[order // top_k], 0, ends)
        y = product(
            activate(packed + biases[0][expert_of_row] if biases else packed, spec.activation), 1, ends
        )
        slots = torch.empty_like(y)
        slots[order] = y + biases[1][expert_of_row] if biases else y
        if has_dropped:
            slots.masked_fill_((flat < 0)[:, None], 0.0)
        return torch.einsum("mkh,mk->mh", slots.view(tokens, top_k, -1), x.topk_weights.to(y.dtype))

    return compute


def _apply_gate(packed: Tensor, activation: Activation) -> Tensor:
    """Apply the activation in the model's dtype by separate operations, as transformers does."""
    gate, up = packed.chunk(2, dim=-1)
    if activation.is_plain:
        return functional.silu(gate) * up
    limit = activation.limit
    gate, up = gate.clamp(max=limit), up.clamp(-(limit or 0.0), limit)
    return gate * torch.sigmoid(gate * activation.alpha) * (up + activation.beta)


Builder = Callable[[ExpertSpec, Weights, bool], ComputeExperts]
"""Builds a contender for a layer; the last argument: some slots have id -1."""
CONTENDERS: dict[str, Builder] = {
    "torch": torch_grouped,
    "transformers": transformers_grouped,
}
