"""A dense layer's weight in the blocked layout that oneDNN multiplies from, where this processor has one."""

from functools import cache
from typing import cast

import torch
from torch import Tensor
from torch.nn import functional


@cache
def packing_refused(dtype: torch.dtype) -> str | None:
    """Why weights of ``dtype`` cannot be packed on this processor, or None. Found by packing a small one."""
    if not torch._C._has_mkldnn:
        return "this torch was built without oneDNN"
    try:
        PackedLinear(torch.zeros(16, 16, dtype=dtype, device="cpu"))(
            torch.zeros(1, 16, dtype=dtype, device="cpu")
        )
    except RuntimeError as error:
        return str(error).splitlines()[0]
    return None


class PackedLinear:
    """``x @ weight.T + bias`` with ``weight`` [N, K] packed once; the plain copy is not kept.

    ``x``: [M, K], contiguous, in the weight's dtype; M may be 0. The product of a row has the same bits whatever
    the other rows are, except that in float32 one row alone may differ from the same row among several.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self.shape = weight.shape
        self._bias = None if bias is None else bias.to(weight.dtype, copy=True)
        self._packed = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous())

    def __call__(self, x: Tensor) -> Tensor:
        return cast(Tensor, torch.ops.mkldnn._linear_pointwise(x, self._packed, self._bias, "none", [], ""))

    def nbytes(self) -> int:
        return int(torch.ops.mkldnn._nbytes(self._packed)) + _nbytes(self._bias)


class PlainLinear:
    """The same product from a row-major copy, for dtypes that oneDNN does not pack here."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self.shape = weight.shape
        self._bias = None if bias is None else bias.to(weight.dtype, copy=True)
        self._weight = weight.clone(memory_format=torch.contiguous_format)

    def __call__(self, x: Tensor) -> Tensor:
        return functional.linear(x, self._weight, self._bias)

    def nbytes(self) -> int:
        return self._weight.nbytes + _nbytes(self._bias)


Linear = PackedLinear | PlainLinear


def make_linear(weight: Tensor, bias: Tensor | None = None) -> Linear:
    """``weight`` [N, K] packed where this processor can, else as it is; ``bias`` [N], taken in the weight's dtype."""
    return PlainLinear(weight, bias) if packing_refused(weight.dtype) else PackedLinear(weight, bias)


def _nbytes(bias: Tensor | None) -> int:
    return 0 if bias is None else bias.nbytes
