"""Expert layers of other packages as contenders, where they are installed; nothing of theirs is copied.

Each builder is a :data:`~xpar.engine.bench.kernels.contenders.Builder`. It raises ImportError without its
package, and ValueError for a layer that the package's function is not asked to compute.
"""

from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from xpar.engine.bench.kernels.cases import Weights
from xpar.engine.bench.kernels.contenders import Builder, ComputeExperts
from xpar.kernels.contracts import Activation, ExpertInput, ExpertSpec


def vllm_fused(spec: ExpertSpec, weights: Weights, has_dropped: bool) -> ComputeExperts:
    """Build vLLM's Triton experts with the configuration that it ships."""
    _require_plain(spec, weights, has_dropped)
    fused_experts = import_module("vllm.model_executor.layers.fused_moe").fused_experts

    def compute(x: ExpertInput) -> Tensor:
        result: Tensor = fused_experts(
            x.hidden_states, weights.gate_up, weights.down, x.topk_weights, x.topk_ids
        )
        return result

    return compute


def sglang_fused(spec: ExpertSpec, weights: Weights, has_dropped: bool) -> ComputeExperts:
    """Build SGLang's Triton experts with the configuration that it ships."""
    _require_plain(spec, weights, has_dropped)
    fused_experts_impl = import_module("sglang.srt.layers.moe.fused_moe_triton.fused_moe").fused_experts_impl

    def compute(x: ExpertInput) -> Tensor:
        result: Tensor = fused_experts_impl(
            x.hidden_states, weights.gate_up, weights.down, x.topk_weights, x.topk_ids,
            inplace=False, activation="silu",
        )  # fmt: skip
        return result

    return compute


def triton_kernels_fused(spec: ExpertSpec, weights: Weights, has_dropped: bool) -> ComputeExperts:
    """Build triton_kernels' ``matmul_ogs``, routed as vLLM does it: both packages are needed."""
    _require_plain(spec, weights, has_dropped)
    matmul_ogs = import_module("triton_kernels.matmul_ogs").matmul_ogs
    routed = import_module("vllm.model_executor.layers.fused_moe.gpt_oss_triton_kernels_moe")

    first, second = weights.gate_up.transpose(1, 2), weights.down.transpose(1, 2)

    def compute(x: ExpertInput) -> Tensor:
        routing, gather, scatter = routed.make_routing_data(x.topk_ids, x.topk_weights, spec.num_experts)
        packed = matmul_ogs(x.hidden_states, first, None, routing, gather_indx=gather)
        gate, up = packed.chunk(2, dim=-1)
        hidden = functional.silu(gate) * up
        result: Tensor = matmul_ogs(
            hidden, second, None, routing, scatter_indx=scatter, gammas=routing.gate_scal
        )
        return result.view(x.hidden_states.shape)

    return compute


def deep_gemm_masked(spec: ExpertSpec, weights: Weights, has_dropped: bool) -> ComputeExperts:
    """Build DeepGEMM's masked products with torch around them: each expert has room for every token."""
    _require_plain(spec, weights, has_dropped)
    product = import_module("deep_gemm").m_grouped_bf16_gemm_nt_masked

    experts, width = spec.num_experts, spec.intermediate_size
    steps = torch.arange(experts + 1, dtype=torch.int32, device=weights.gate_up.device)

    def multiply(rows: Tensor, weight: Tensor, counts: Tensor, expected: int) -> Tensor:
        result = rows.new_empty(experts, rows.shape[1], weight.shape[1])
        product(rows, weight, result, counts, expected)
        return result

    def compute(x: ExpertInput) -> Tensor:
        tokens, top_k = x.topk_ids.shape
        flat = x.topk_ids.reshape(-1)
        ids, order = torch.sort(flat, stable=True)
        bounds = torch.searchsorted(ids, steps)
        counts = bounds.diff().to(torch.int32)
        place = ids.long() * tokens + torch.arange(len(ids), device=ids.device) - bounds[ids.long()]
        rows = x.hidden_states.new_empty(experts * tokens, spec.hidden_size)
        rows[place] = x.hidden_states[order // top_k]
        expected = max(1, tokens * top_k // experts)
        packed = multiply(rows.view(experts, tokens, -1), weights.gate_up, counts, expected)
        hidden = functional.silu(packed[..., :width]) * packed[..., width:]
        y = multiply(hidden, weights.down, counts, expected).view(experts * tokens, -1)
        slots = y.new_empty(len(ids), spec.hidden_size)
        slots[order] = y[place]
        return torch.einsum("mkh,mk->mh", slots.view(tokens, top_k, -1), x.topk_weights.to(y.dtype))

    return compute


PACKAGES: dict[str, tuple[tuple[str, ...], Builder]] = {
    "vllm": (("vllm",), vllm_fused),
    "sglang": (("sglang",), sglang_fused),
    "triton_kernels": (("triton_kernels", "vllm"), triton_kernels_fused),
    "deep_gemm": (("deep_gemm",), deep_gemm_masked),
}
"""The packages that each contender needs, and its builder."""


def find_installed(find: Any = find_spec) -> dict[str, Builder]:
    """Return the contenders whose packages are installed; ``find`` is None for a missing one."""
    return {name: build for name, (packages, build) in PACKAGES.items() if all(find(p) for p in packages)}


def _require_plain(spec: ExpertSpec, weights: Weights, has_dropped: bool) -> None:
    """Raise ValueError for what these functions are not asked to compute."""
    if weights.biases or has_dropped or spec.activation != Activation("silu"):
        raise ValueError("computes no biases, no slots of other ranks and no activation but SiLU here")
