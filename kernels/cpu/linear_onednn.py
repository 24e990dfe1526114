"""Dense products from weights in the blocked layout of oneDNN, if the processor has one."""

from functools import cache
from typing import cast

import torch
from torch import Tensor
from torch.nn import functional


@cache
def why_not_packed(dtype: torch.dtype) -> str | None:
    """Return why weights of ``dtype`` cannot be packed here, or None; packs one to find out."""
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
    """A dense product packed by oneDNN; in float32 a row alone may have other bits than among others."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self.shape = weight.shape
        self._bias = None if bias is None else bias.to(weight.dtype, copy=True)
        self._packed = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous())

    def __call__(self, x: Tensor) -> Tensor:
        return cast(Tensor, torch.ops.mkldnn._linear_pointwise(x, self._packed, self._bias, "none", [], ""))

    def nbytes(self) -> int:
        return int(torch.ops.mkldnn._nbytes(self._packed)) + _nbytes(self._bias)


class PlainLinear:
    """A dense product with a row-major copy, for dtypes that oneDNN cannot pack."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self.shape = weight.shape
        self._bias = None if bias is None else bias.to(weight.dtype, copy=True)
        self._weight = weight.clone(memory_format=torch.contiguous_format)

    def __call__(self, x: Tensor) -> Tensor:
        return functional.linear(x, self._weight, self._bias)

    def nbytes(self) -> int:
        return self._weight.nbytes + _nbytes(self._bias)


Linear = PackedLinear | PlainLinear


def pack_linear(weight: Tensor, bias: Tensor | None = None) -> Linear:
    """Pack ``weight`` [N, K] if this processor can, else copy it; ``bias`` is cast to its dtype."""
    return PlainLinear(weight, bias) if why_not_packed(weight.dtype) else PackedLinear(weight, bias)


def _nbytes(bias: Tensor | None) -> int:
    return 0 if bias is None else bias.nbytes
