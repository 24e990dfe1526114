"""Dense layers' products by this package's own compiled code from weights that stay codes and scales."""

import torch
from torch import Tensor

from xpar.kernels.cpu import quantised_library
from xpar.kernels.cpu.quantised_library import PackedCodes
from xpar.kernels.quantised_weight import QuantisedWeight, WeightFormat


def why_not(fmt: WeightFormat, dtype: torch.dtype) -> str | None:
    """Return the reason why products of rows in ``dtype`` cannot be computed from ``fmt`` here, or None."""
    if dtype != torch.bfloat16:
        return f"multiplies rows in bfloat16, not in {str(dtype).removeprefix('torch.')}"
    return quantised_library.why_not_format(fmt) or quantised_library.why_unavailable()


class NativeQuantisedLinear:
    """A dense product in bfloat16; the bits of a row do not depend on the other rows."""

    def __init__(self, weight: QuantisedWeight, bias: Tensor | None = None) -> None:
        outputs, inputs = weight.shape
        self.shape = weight.shape
        self._weights = PackedCodes(1, outputs, inputs, weight.format, bias is not None)
        self._weights.load(0, weight, bias)

    def __call__(self, x: Tensor) -> Tensor:
        return self._weights.multiply(x, [(0, 0, x.shape[0])] if x.shape[0] else [])

    def nbytes(self) -> int:
        return self._weights.nbytes()
