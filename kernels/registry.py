"""Which expert kernel serves a layer, and why not the others."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

from xpar.kernels.contracts import ActivationName, ExpertKernel, ExpertSpec, RouteSpec
from xpar.kernels.cpu import experts_native, experts_onednn, experts_zen, native_library
from xpar.kernels.cpu.experts_native import NativeExperts
from xpar.kernels.cpu.experts_onednn import OneDnnExperts
from xpar.kernels.cpu.experts_zen import ZenExperts
from xpar.kernels.gpu import availability as gpu
from xpar.kernels.plain import ReferenceExperts


@dataclass(frozen=True)
class FusedRouting:
    """That a kernel covers the steps route, compute and combine in one call, where it holds every expert.

    ``scorings``: the ones it routes by, ungrouped and without a bias. ``tokens``: up to so many one call is the faster
    way. ``measured``: by how much, with shape and source.
    """

    scorings: tuple[str, ...]
    tokens: int
    measured: str

    def refuses(self, route: RouteSpec) -> str | None:
        """Why one call cannot route so, or None."""
        if route.other is not None:
            return f"does not route with {route.other}"
        if route.scoring not in self.scorings:
            return f"routes by {_names(self.scorings)}, not by {route.scoring}"
        if route.num_expert_group > 1 or route.correction_bias:
            return "routes without groups and correction bias"
        return None


@dataclass(frozen=True)
class KernelEntry:
    """What one kernel can do.

    ``devices``: torch device types. ``activations``: the plain gated ones it has; ``all_activations``: and every other
    form of :class:`~xpar.kernels.contracts.Activation`. ``row_invariant``: whether it can promise what ``ExpertSpec.row_invariant``
    asks. ``unavailable(spec)``: why this machine or this shape rules it out, or None; imports nothing heavy.
    ``outdone(spec)``: why ``auto`` leaves ``spec`` to those after it although it could serve, or None.
    ``measured``: how fast it was, with shape and source. ``one_call``: what it covers besides computing, or None; its
    kernels then are :class:`~xpar.kernels.contracts.OneCallKernel`.
    """

    name: str
    devices: tuple[str, ...]
    dtypes: tuple[torch.dtype, ...]
    activations: tuple[ActivationName, ...]
    row_invariant: bool
    unavailable: Callable[[ExpertSpec], str | None]
    build: Callable[[ExpertSpec], ExpertKernel]
    measured: str
    all_activations: bool = False
    one_call: FusedRouting | None = None
    outdone: Callable[[ExpertSpec], str | None] = lambda spec: None

    def refuses(self, spec: ExpertSpec) -> str | None:
        """Why this kernel cannot serve ``spec``, or None."""
        device = spec.device.split(":")[0]
        if device not in self.devices:
            return f"runs on {_names(self.devices)}, not on {device}"
        if spec.dtype not in self.dtypes:
            return f"computes in {_names(self.dtypes)}, not in {_names([spec.dtype])}"
        named = spec.activation.plain and spec.activation.name in self.activations
        if not named and not self.all_activations:
            return f"has activations {_names(self.activations)}, not {spec.activation}"
        if spec.row_invariant and not self.row_invariant:
            return "a row's bits may depend on the rest of the batch, which exact mode rules out"
        return self.unavailable(spec)


@dataclass(frozen=True)
class Choice:
    """The kernel chosen, and for each kernel passed over (name, reason)."""

    record: KernelEntry
    rejected: tuple[tuple[str, str], ...]

    def explain(self) -> str:
        """One line per kernel, the chosen one first."""
        lines = [f"{self.record.name}: chosen ({self.record.measured})"]
        return "\n".join(lines + [f"{name}: passed over, {reason}" for name, reason in self.rejected])


_FLOATS = (torch.bfloat16, torch.float16, torch.float32)
_GATED: tuple[ActivationName, ...] = ("silu", "gelu", "gelu_tanh")
# Ratios of minimum times, interleaved in one process: H 2048, I 1024, E 64, k 8, bfloat16, 2 threads of a Zen 5 EPYC.
_OLMOE = (
    "faster than transformers' better experts at 1 / 4 / 16 / 64 / 256 / 1024 tokens (OLMoE, bf16, 2 cores)"
)

_ONE_CALL = (
    "x faster than the steps one by one at 1 / 2 / 4 tokens (OLMoE, bf16, 1 thread of a loaded machine)"
)

# The same on a Xeon without avx512_bf16, by xpar bench layer olmoe --compare transformers, and --compare steps.
_OLMOE_XEON = "faster than transformers' better experts at 1 / 4 / 16 / 64 / 256 / 1024 tokens (OLMoE, bf16, 2 cores of a Xeon)"
_ONE_CALL_XEON = (
    "x faster than the steps one by one at 1 / 2 / 4 tokens (OLMoE, bf16, 2 threads of that Xeon)"
)

# Fastest first: the first that serves a spec is chosen.
KERNELS: tuple[KernelEntry, ...] = (
    KernelEntry(
        name="zentorch",
        devices=("cpu",),
        dtypes=(torch.bfloat16,),
        activations=_GATED,
        row_invariant=False,
        unavailable=experts_zen.unavailable,
        build=ZenExperts,
        one_call=FusedRouting(("softmax",), tokens=4, measured=f"1.03 / 1.02 / 1.06 {_ONE_CALL}"),
        measured=f"2.1 / 1.9 / 1.8 / 1.8 / 1.5 / 1.2 x {_OLMOE}",
    ),
    KernelEntry(
        name="native",
        devices=("cpu",),
        dtypes=(torch.bfloat16,),
        activations=_GATED,
        row_invariant=True,
        unavailable=experts_native.unavailable,
        build=NativeExperts,
        all_activations=True,
        one_call=FusedRouting(("softmax",), tokens=4, measured=f"1.03 / 1.02 / 1.02 {_ONE_CALL_XEON}"),
        measured=f"1.9 / 2.3 / 2.8 / 5.3 / 5.0 / 4.2 x {_OLMOE_XEON}; onednn there 1.2 / 1.1 / 1.0 / 1.1 / 1.0 / 1.0",
        outdone=lambda spec: native_library.outdone(),
    ),
    KernelEntry(
        name="onednn",
        devices=("cpu",),
        dtypes=_FLOATS,
        activations=_GATED,
        row_invariant=True,
        unavailable=experts_onednn.unavailable,
        build=OneDnnExperts,
        all_activations=True,
        one_call=FusedRouting(("softmax",), tokens=4, measured=f"1.08 / 1.01 / 1.01 {_ONE_CALL}"),
        measured=f"1.4 / 1.4 / 1.3 / 1.4 / 1.3 / 1.2 x {_OLMOE}",
    ),
    KernelEntry(
        name="triton",
        devices=("cuda",),
        dtypes=_FLOATS,
        activations=_GATED,
        row_invariant=True,
        unavailable=gpu.unavailable,
        build=gpu.build,
        all_activations=True,
        measured="measure with xpar bench kernels",
    ),
    KernelEntry(
        name="reference",
        devices=("cpu", "cuda"),
        dtypes=_FLOATS,
        activations=_GATED,
        row_invariant=False,
        unavailable=lambda spec: None,
        build=ReferenceExperts,
        all_activations=True,
        measured="the definition, not made to be fast",
    ),
)


def choose(spec: ExpertSpec, name: str = "auto", kernels: tuple[KernelEntry, ...] = KERNELS) -> Choice:
    """The first of ``kernels`` that serves ``spec``, or the one called ``name``.

    Raises ValueError, with every kernel's reason, if none does or the named one does not.
    """
    reasons = [(record, record.refuses(spec)) for record in kernels]
    if name == "auto":
        reasons = [(record, reason or record.outdone(spec)) for record, reason in reasons]
        chosen = next((record for record, reason in reasons if reason is None), None)
        if chosen is None:
            lines = "\n".join(f"  {record.name}: {reason}" for record, reason in reasons)
            raise ValueError(f"no kernel serves {spec}:\n{lines}")
        other = f"measured slower than {chosen.name}"
    else:
        chosen = _named(name, reasons)
        other = f"{name} was asked for by name"
    return Choice(chosen, tuple((r.name, why or other) for r, why in reasons if r is not chosen))


def _named(name: str, reasons: list[tuple[KernelEntry, str | None]]) -> KernelEntry:
    names = _names(record.name for record, _ in reasons)
    for record, reason in reasons:
        if record.name == name:
            if reason is not None:
                raise ValueError(f"kernel={name!r}: {reason}; choose auto or one of {names}")
            return record
    raise ValueError(f"kernel={name!r}: there is none of that name; choose auto or one of {names}")


def _names(values: Iterable[object]) -> str:
    return ", ".join(str(value).removeprefix("torch.") for value in values)
