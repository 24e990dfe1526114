"""The registry of dense products on host processors, and the choice of one with its reasons.

For layers that may round differently when a batch has other rows; layers that may not keep plain products.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from xpar.kernels.choice import Choice, choose
from xpar.kernels.cpu import linear_native_quantised, linear_zen, native_library, zen_library
from xpar.kernels.cpu.linear_native import NativeLinear
from xpar.kernels.cpu.linear_native_quantised import NativeQuantisedLinear
from xpar.kernels.cpu.linear_onednn import PackedLinear, PlainLinear, why_not_packed
from xpar.kernels.cpu.linear_zen import ZenLinear
from xpar.kernels.quantised_weight import QuantisedWeight


class LinearKernel(Protocol):
    """The product ``x @ weight.T + bias`` of a weight [N, K] packed once, without a plain copy."""

    def __call__(self, x: Tensor) -> Tensor:
        """Return [M, N] for ``x`` [M, K], contiguous, in the weight's dtype; M may be 0."""

    def nbytes(self) -> int:
        """Return the bytes that weight and bias occupy."""


@dataclass(frozen=True)
class LinearEntry:
    """One dense product of the registry and its abilities.

    Attributes:
        name: the name in options and reports.
        dtypes: dtypes of weights that it serves; None for every dtype.
        why_unavailable: returns the reason why it cannot serve one of its dtypes on this machine, or None.
        build: packs a weight [N, K] and a bias [N] or None.
        measured: how fast it was, with shape and machine.
        why_unsuitable: returns the reason why ``auto`` prefers a later entry although this one could serve,
            or None.
    """

    name: str
    dtypes: tuple[torch.dtype, ...] | None
    why_unavailable: Callable[[torch.dtype], str | None]
    build: Callable[[Tensor, Tensor | None], LinearKernel]
    measured: str
    why_unsuitable: Callable[[], str | None] = lambda: None

    def why_not(self, dtype: torch.dtype) -> str | None:
        """Return why it cannot serve weights of ``dtype`` here, or None; imports nothing heavy."""
        if self.dtypes is None or dtype in self.dtypes:
            return self.why_unavailable(dtype)
        names = " and ".join(str(one)[6:] for one in self.dtypes)
        return f"serves {names}, not {str(dtype)[6:]}"


PLAIN = "plain"
"""The name of the choice that leaves the model's own products unchanged."""
QUANTISED = "native-quantised"
"""The name of the product that computes from codes and scales."""
_PLAIN = LinearEntry(PLAIN, None, lambda dtype: None, PlainLinear, "the model's own products")
_SHAPE = "torch at 1, 4, 16, 64 rows of 2048 x 2048, 1 thread of an EPYC (Zen 4), benchmarks/dense_layers.py"
# Fastest first.
LINEAR_KERNELS = (
    LinearEntry(
        "zentorch",
        linear_zen.DTYPES,
        lambda dtype: zen_library.why_unavailable(),
        ZenLinear,
        f"bf16 1.8 / 1.9 / 1.5 / 1.2, fp32 1.1 / 2.3 / 1.9 / 1.5 x {_SHAPE}",
    ),
    LinearEntry(
        "native",
        (torch.bfloat16,),
        lambda dtype: native_library.why_unavailable(),
        NativeLinear,
        "1.9 / 2.9 / 4.7 / 4.7 x torch at 1, 4, 16, 64 rows of 2048 x 2048, 1 thread of a Xeon without "
        "avx512_bf16; onednn there 1.4 / 0.9 / 1.0 / 1.0",
        native_library.why_unsuitable,
    ),
    LinearEntry(
        "onednn",
        (torch.bfloat16, torch.float16, torch.float32),
        why_not_packed,
        PackedLinear,
        f"bf16 1.3 / 1.5 / 1.4 / 1.1, fp32 0.9 / 1.9 / 1.7 / 1.5 x {_SHAPE}",
    ),
)


def choose_linear(
    dtype: torch.dtype, name: str = "auto", entries: tuple[LinearEntry, ...] = LINEAR_KERNELS
) -> Choice[LinearEntry]:
    """Choose the first of ``entries`` that serves ``dtype``, or the one called ``name``.

    Args:
        dtype: dtype of the weights.
        name: an entry's name, ``PLAIN`` or "auto", which takes ``PLAIN`` if no entry serves.
        entries: the candidates, the fastest first.

    Raises:
        ValueError: there is no entry of that name, or it cannot serve ``dtype`` on this machine.

    Example:
        >>> linear = choose_linear(torch.float32, "plain").chosen.build(torch.ones(2, 3), None)
        >>> linear(torch.ones(1, 3))
        tensor([[3., 3.]])
    """
    return choose(
        (*entries, _PLAIN),
        refuses=lambda entry: entry.why_not(dtype),
        prefers_another=lambda entry: entry.why_unsuitable(),
        name=name,
        option="dense",
        outranked="measured slower than {chosen}",
    )


def build_quantised_linear(
    weight: QuantisedWeight, bias: Tensor | None, dtype: torch.dtype, name: str = "auto"
) -> LinearKernel:
    """Build the product of a quantised weight: from its codes if that is possible, else converted.

    Args:
        weight: [N, K].
        bias: [N], or None.
        dtype: dtype of the rows, and of a converted weight.
        name: "auto", or the name of an entry, which gets a converted weight. ``native-quantised`` is the name
            of the product that computes from codes.

    Raises:
        ValueError: the named product does not exist or cannot serve.
    """
    reason = linear_native_quantised.why_not(weight.format, dtype)
    if name == QUANTISED and reason is not None:
        raise ValueError(f"dense={name!r} with {weight.format} weights: {reason}")
    if name == QUANTISED or (name == "auto" and reason is None):
        return NativeQuantisedLinear(weight, bias)
    return choose_linear(dtype, name).chosen.build(weight.dequantise().to(dtype), bias)
