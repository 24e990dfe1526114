"""Which product serves a dense layer on this processor, and why not the others.

For layers that may round differently when other rows come along; what may not keeps plain products.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from xpar.kernels.cpu import linear_zen, native_library, zen_library
from xpar.kernels.cpu.linear_native import NativeLinear
from xpar.kernels.cpu.linear_onednn import PackedLinear, packing_refused
from xpar.kernels.cpu.linear_zen import ZenLinear


class LinearKernel(Protocol):
    """``x @ weight.T + bias`` of a packed weight; ``x``: [M, K], contiguous, in the weight's dtype; M may be 0."""

    def __call__(self, x: Tensor) -> Tensor: ...

    def nbytes(self) -> int: ...


@dataclass(frozen=True)
class LinearEntry:
    """``unavailable(dtype)``: why it cannot serve one of its ``dtypes`` here, or None. ``build(weight, bias)``: packs, and
    keeps no plain weight. ``measured``: how fast it was, with shape and source. ``outdone()``: why ``auto`` leaves products
    to those after it although it could serve, or None.
    """

    name: str
    dtypes: tuple[torch.dtype, ...]
    unavailable: Callable[[torch.dtype], str | None]
    build: Callable[[Tensor, Tensor | None], LinearKernel]
    measured: str
    outdone: Callable[[], str | None] = lambda: None

    def refused(self, dtype: torch.dtype) -> str | None:
        """Why it cannot serve ``dtype`` here, or None. Imports nothing heavy."""
        if dtype in self.dtypes:
            return self.unavailable(dtype)
        names = " and ".join(str(one)[6:] for one in self.dtypes)
        return f"serves {names}, not {str(dtype)[6:]}"


PLAIN = "plain"
"""The model's own products."""
_SHAPE = "torch at 1, 4, 16, 64 rows of 2048 x 2048, 1 thread of an EPYC (Zen 4), benchmarks/dense_layers.py"
LINEAR_KERNELS = (
    LinearEntry(
        "zentorch",
        linear_zen.DTYPES,
        lambda dtype: zen_library.refused(),
        ZenLinear,
        f"bf16 1.8 / 1.9 / 1.5 / 1.2, fp32 1.1 / 2.3 / 1.9 / 1.5 x {_SHAPE}",
    ),
    LinearEntry(
        "native",
        (torch.bfloat16,),
        lambda dtype: native_library.refused(),
        NativeLinear,
        "1.9 / 2.9 / 4.7 / 4.7 x torch at 1, 4, 16, 64 rows of 2048 x 2048, 1 thread of a Xeon without avx512_bf16; onednn there "
        "1.4 / 0.9 / 1.0 / 1.0",
        native_library.outdone,
    ),
    LinearEntry(
        "onednn",
        (torch.bfloat16, torch.float16, torch.float32),
        packing_refused,
        PackedLinear,
        f"bf16 1.3 / 1.5 / 1.4 / 1.1, fp32 0.9 / 1.9 / 1.7 / 1.5 x {_SHAPE}",
    ),
)


@dataclass(frozen=True)
class LinearChoice:
    """``record``: what serves, None for plain products. ``rejected``: the others' names, and why."""

    record: LinearEntry | None
    rejected: tuple[tuple[str, str], ...]

    @property
    def name(self) -> str:
        return name_of(self.record)


def choose_linear(
    dtype: torch.dtype, name: str = "auto", records: tuple[LinearEntry, ...] = LINEAR_KERNELS
) -> LinearChoice:
    """The fastest for weights of ``dtype``, or what ``name`` says; ValueError if that cannot serve here."""
    reasons = {record.name: record.refused(dtype) for record in records}
    chosen: LinearEntry | None
    if name == "auto":
        reasons = {record.name: reasons[record.name] or record.outdone() for record in records}
        chosen = next((record for record in records if reasons[record.name] is None), None)
        other = f"measured slower than {chosen.name}" if chosen else ""
    else:
        chosen = _named(name, reasons, records)
        other = f"{name} was asked for by name"
    return LinearChoice(
        chosen, tuple((n, why or other) for n, why in reasons.items() if n != name_of(chosen))
    )


def name_of(record: LinearEntry | None) -> str:
    """What options and reports call it."""
    return PLAIN if record is None else record.name


def _named(
    name: str, reasons: Mapping[str, str | None], records: tuple[LinearEntry, ...]
) -> LinearEntry | None:
    if name == PLAIN:
        return None
    names = ", ".join([*reasons, PLAIN])
    reason = reasons.get(name, "there is none of that name")
    if reason is not None:
        raise ValueError(f"dense={name!r}: {reason}; choose auto or one of {names}")
    return next(record for record in records if record.name == name)
