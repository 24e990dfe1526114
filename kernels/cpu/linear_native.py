"""Dense layers' bfloat16 products by this package's own compiled code."""

from torch import Tensor

from xpar.kernels.cpu import native_library
from xpar.kernels.cpu.native_library import PackedWeights


class NativeLinear:
    """A dense product in bfloat16; the bits of a row do not depend on the other rows."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self.shape = weight.shape
        self._weights = PackedWeights(
            1, weight.shape[0], weight.shape[1], bias is not None, native_library.best_set()
        )
        self._weights.load(0, weight, bias)

    def __call__(self, x: Tensor) -> Tensor:
        return self._weights.multiply(x, [(0, 0, x.shape[0])] if x.shape[0] else [])

    def nbytes(self) -> int:
        return self._weights.nbytes()
