"""Experts by this package's own compiled code from weights that stay codes and scales in memory."""

from typing import NoReturn

import torch
from torch import Tensor

from xpar.kernels.activations import activate
from xpar.kernels.contracts import ExpertSpec, check_expert_weights
from xpar.kernels.cpu import quantised_library
from xpar.kernels.cpu.experts_native import SpanExperts
from xpar.kernels.cpu.native_library import Span
from xpar.kernels.cpu.quantised_library import PackedCodes
from xpar.kernels.quantised_weight import QuantisedWeight


def why_unavailable(spec: ExpertSpec) -> str | None:
    """Return the reason why this kernel cannot serve ``spec`` on this machine, or None."""
    if spec.weight_format is None:
        return "computes from quantised weights alone"
    return quantised_library.why_unavailable()


class NativeQuantisedExperts(SpanExperts):
    """An expert kernel with bfloat16 rows and quantised weights, for x86 processors with AVX2 or AVX-512.

    Implements :class:`~xpar.kernels.contracts.QuantisedKernel`. Rows are not quantised.
    """

    name = "native-quantised"

    def __init__(self, spec: ExpertSpec) -> None:
        if spec.weight_format is None:
            raise ValueError(f"{self.name} {why_unavailable(spec)}, and {spec} has no weight_format")
        self.spec = spec
        e, h, i, fmt = spec.num_experts, spec.hidden_size, spec.intermediate_size, spec.weight_format
        self._gate_up = PackedCodes(e, spec.activation.gate_up_rows(i), h, fmt, spec.bias)
        self._down = PackedCodes(e, h, i, fmt, spec.bias)
        self._missing = set(range(e))

    def load_expert(
        self,
        index: int,
        gate_up: Tensor,
        down: Tensor,
        gate_up_bias: Tensor | None = None,
        down_bias: Tensor | None = None,
    ) -> NoReturn:
        check_expert_weights(self.spec, index, gate_up, down, gate_up_bias, down_bias)
        raise AssertionError("weights in plain numbers never fit a spec with a weight_format")

    def load_quantised(
        self,
        index: int,
        gate_up: QuantisedWeight,
        down: QuantisedWeight,
        gate_up_bias: Tensor | None = None,
        down_bias: Tensor | None = None,
    ) -> None:
        check_expert_weights(self.spec, index, gate_up, down, gate_up_bias, down_bias)
        self._gate_up.load(index, gate_up, gate_up_bias)
        self._down.load(index, down, down_bias)
        self._missing.discard(index)

    def nbytes(self) -> int:
        return self._gate_up.nbytes() + self._down.nbytes()

    def _compute_loaded(self, hidden_states: Tensor, spans: list[Span], source: Tensor) -> Tensor:
        # Rounding these rows too would make half of the layer's error.
        gate_up_rows = self._gate_up.multiply(hidden_states, spans, source, torch.float32)
        hidden = activate(gate_up_rows, self.spec.activation, self.spec.row_invariant)
        return self._down.multiply(hidden.to(torch.bfloat16), spans)
