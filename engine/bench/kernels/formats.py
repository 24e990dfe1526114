"""Checks and times of the kernels of quantised weights, beside the same layer in bfloat16.

A format is a column: its weights are drawn as codes and scales, every contender computes the same layer, and
all are timed in turn, in short bursts of recorded steps.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from xpar.engine.bench.ceilings import GpuCeilings
from xpar.engine.bench.kernels.cases import LayerCase, Weights, load_experts, random_input, random_inputs
from xpar.engine.bench.kernels.checks import poison
from xpar.engine.bench.kernels.contenders import ComputeExperts, torch_grouped, torch_scaled_grouped
from xpar.kernels.contracts import ExpertInput, ExpertSpec
from xpar.kernels.gpu.availability import build
from xpar.kernels.quantised_rows import quantised_mlp
from xpar.kernels.quantised_weight import ActivationScheme, CodeType, QuantisedWeight, WeightFormat
from xpar.kernels.reference import mlp

WEIGHTS_ALONE, DEQUANTISED, EMULATED = 6e-3, 6e-2, 4e-3
"""Largest relative errors: of exact activations; of quantised ones, and beside their emulation."""
_FP8_SPEED = 1.6  # products of e4m3 by blocks against those of bfloat16, by cuBLAS on an H200


@dataclass(frozen=True)
class Format:
    """A column: the format of the weights, and the scheme of the activations."""

    weight: WeightFormat
    scheme: ActivationScheme | None = None


_E4M3 = WeightFormat(CodeType.E4M3, (128, 128), torch.float32)
_CHANNEL = WeightFormat(CodeType.E4M3, (1, 0), torch.float32)
FORMATS = {
    "fp8-block": Format(_E4M3, ActivationScheme()),
    "fp8-block-ue8m0": Format(_E4M3, ActivationScheme(power_of_two=True)),
    "fp8-channel": Format(_CHANNEL, ActivationScheme(0)),
    "fp8-block-w8a16": Format(_E4M3),
    "fp8-channel-w8a16": Format(_CHANNEL),
    "int4-32": Format(WeightFormat(CodeType.INT4, (1, 32), torch.bfloat16)),
    "int4-128": Format(WeightFormat(CodeType.INT4, (1, 128), torch.bfloat16)),
    "int4-128-zeros": Format(WeightFormat(CodeType.INT4, (1, 128), torch.float16, zero_point=True)),
    "mxfp4": Format(WeightFormat(CodeType.E2M1, (1, 32), torch.float8_e8m0fnu)),
    "nvfp4": Format(WeightFormat(CodeType.E2M1, (1, 16), torch.float8_e4m3fn, global_scale=True)),
}


@dataclass(frozen=True)
class CodedLayer:
    """A layer of one format: a weight pair (gate_up, down) for each expert, and its biases."""

    layer: LayerCase
    spec: ExpertSpec
    weights: list[tuple[QuantisedWeight, QuantisedWeight]]
    biases: tuple[Tensor, ...]

    def dense(self, expert: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """Return an expert's dequantised weights and its biases in ``dtype``."""
        tensors = [w.dequantise() for w in self.weights[expert]] + [b[expert] for b in self.biases]
        return tuple(tensor.to(dtype) for tensor in tensors)

    def plain(self) -> Weights:
        """Return the weights of all experts in the layer's dtype."""
        pairs = [self.dense(e, self.spec.dtype)[:2] for e in range(len(self.weights))]
        return Weights(torch.stack([p[0] for p in pairs]), torch.stack([p[1] for p in pairs]), self.biases)


def draw_weight(weight_format: WeightFormat, rows: int, cols: int, g: torch.Generator) -> QuantisedWeight:
    """Draw a weight [rows, cols] that keeps the variance of unit inputs, as codes and scales."""
    grid = weight_format.grid(rows, cols)
    if weight_format.code.is_nibble:
        return _draw_nibbles(weight_format, rows, cols, g)
    values = torch.randn(rows, cols, generator=g, device=g.device)
    codes = (values * 60).clamp(-448, 448).to(weight_format.code.dtype)
    scales = (torch.rand(grid, generator=g, device=g.device) + 0.5) / (60 * cols**0.5)
    return QuantisedWeight(weight_format, codes, scales.to(weight_format.scale), cols)


def _draw_nibbles(weight_format: WeightFormat, rows: int, cols: int, g: torch.Generator) -> QuantisedWeight:
    """Draw any nibbles, and scales of several octaves."""
    grid, spread = weight_format.grid(rows, cols), 3.4 if weight_format.code is CodeType.E2M1 else 5.0
    octaves = torch.randn(grid, generator=g, device=g.device) * 0.5
    scales = torch.exp2(octaves) * (20.0 if weight_format.global_scale else 1.0) / (spread * cols**0.5)
    shape = weight_format.code_shape(rows, cols)
    codes = torch.randint(0, 256, shape, generator=g, device=g.device, dtype=torch.uint8)
    zeros = torch.randint(4, 13, grid, generator=g, device=g.device, dtype=torch.uint8)
    factor = torch.tensor(0.05, device=g.device) if weight_format.global_scale else None
    return QuantisedWeight(
        weight_format,
        codes,
        scales.to(weight_format.scale),
        cols,
        zeros if weight_format.zero_point else None,
        factor,
    )


def draw_layer(layer: LayerCase, coding: Format, dtype: torch.dtype, g: torch.Generator) -> CodedLayer:
    """Draw the experts of a layer in a format, on the device of ``g``."""
    spec = replace(
        layer.spec(dtype, str(g.device)), weight_format=coding.weight, activation_scheme=coding.scheme
    )
    h, i, packed = (
        spec.hidden_size,
        spec.intermediate_size,
        spec.activation.gate_up_rows(spec.intermediate_size),
    )
    weights = [
        (draw_weight(coding.weight, packed, h, g), draw_weight(coding.weight, h, i, g))
        for _ in range(spec.num_experts)
    ]
    sizes = (packed, h) if spec.bias else ()
    biases = (torch.randn(spec.num_experts, n, generator=g, device=g.device) * 0.5 for n in sizes)
    return CodedLayer(layer, spec, weights, tuple(b.to(dtype) for b in biases))


def load_coded(coded: CodedLayer) -> Any:
    """Build the kernel of the layer's format and load its codes."""
    kernel = build(coded.spec)
    for e, pair in enumerate(coded.weights):
        kernel.load_quantised(e, *pair, *(b[e] for b in coded.biases))  # type: ignore[attr-defined]
    return kernel


def expected_rows(
    coded: CodedLayer, x: ExpertInput, tokens: Tensor, scheme: ActivationScheme | None
) -> Tensor:
    """Compute the outputs [len(tokens), H] float64 of some tokens, with activations quantised or not."""
    compute: Callable[..., Tensor] = mlp if scheme is None else partial(quantised_mlp, scheme=scheme)
    hidden, ids = x.hidden_states[tokens], x.topk_ids[tokens]
    out = torch.zeros(len(tokens), coded.spec.hidden_size, dtype=torch.float64, device=hidden.device)
    for expert in torch.unique(ids[ids >= 0]).tolist():
        row, slot = (ids == expert).nonzero(as_tuple=True)
        dense = coded.dense(expert, torch.float64)
        y = compute(hidden[row], coded.spec.activation, *dense, dtype=torch.float64)
        out.index_add_(0, row, y * x.topk_weights[tokens][row, slot, None].double())
    return out


def check_format(coded: CodedLayer, kernel: Any, g: torch.Generator, tokens: int) -> str:
    """Check a skewed step with an empty expert: all rows finite, 16 of them near both references."""
    x = random_input(coded.spec, tokens, coded.layer.top_k, coded.layer.of, g, skewed=True)
    sample = torch.randperm(tokens, generator=g, device=g.device)[:16]
    poison(g.device)
    got = kernel.compute(x)
    if not bool(torch.isfinite(got).all()):
        raise AssertionError(f"{int((~torch.isfinite(got)).any(1).sum())} of {tokens} rows are not finite")
    errors = {"dequantised": _error(got[sample], expected_rows(coded, x, sample, None))}
    bars = {"dequantised": WEIGHTS_ALONE}
    if coded.spec.activation_scheme and not kernel.is_tiny(x):
        bars = {"dequantised": DEQUANTISED, "emulated": EMULATED}
        errors["emulated"] = _error(
            got[sample], expected_rows(coded, x, sample, coded.spec.activation_scheme)
        )
    for name, error in errors.items():
        if not error <= bars[name]:
            raise AssertionError(f"{name}: relative error {error:.2e} exceeds {bars[name]:.0e}")
    return ", ".join(f"{name} {error:.1e}" for name, error in errors.items())


def _error(got: Tensor, expected: Tensor) -> float:
    return float((got.double() - expected).norm() / expected.norm().clamp_min(1e-30))


def floor_s(coded: CodedLayer, kernel: Any, inputs: list[ExpertInput], ceilings: GpuCeilings) -> float:
    """Compute the least seconds of a step: the chosen experts' codes read once, or the products.

    Products are those of e4m3; where each activation has two codes there are twice as many.
    """
    spec, total = coded.spec, 0.0
    work = 2 * spec.hidden_size * (spec.activation.gate_up_rows(1) + 1) * spec.intermediate_size
    for x in inputs:
        active = x.topk_ids[x.topk_ids >= 0]
        read = torch.unique(active).numel() * kernel.nbytes() / spec.num_experts / ceilings.bandwidth
        product = active.numel() * work * kernel.terms / (ceilings.flops * _FP8_SPEED)
        total += max(read, product)
    return total / len(inputs)


def contenders(
    coded: CodedLayer, kernel: Any, has_dropped: bool, names: list[str]
) -> dict[str, ComputeExperts]:
    """Return the ways to compute the layer: the kernel of codes, xpar's bfloat16, torch's products."""
    found: dict[str, ComputeExperts] = {"codes": kernel.compute}
    plain = coded.plain() if {"bf16", "torch"} & set(names) else None
    spec = replace(coded.spec, weight_format=None, activation_scheme=None)
    if plain is not None and "bf16" in names:
        own = build(spec)
        load_experts(own, plain)
        found["bf16"] = own.compute
    if plain is not None and "torch" in names:
        found["torch"] = torch_grouped(spec, plain, has_dropped)
    by_row = coded.spec.weight_format == _CHANNEL and coded.spec.activation_scheme == ActivationScheme(0)
    if "scaled" in names and by_row:
        found["scaled"] = torch_scaled_grouped(coded.spec, coded.weights, coded.biases, has_dropped)
    return found


def format_inputs(coded: CodedLayer, tokens: int, g: torch.Generator) -> list[ExpertInput]:
    """Draw inputs to time in turn."""
    return random_inputs(coded.spec, coded.layer, tokens, g)
