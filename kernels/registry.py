"""The registry of expert kernels, and the choice of one for a layer, with reasons."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import torch

from xpar.kernels.choice import Choice, choose
from xpar.kernels.contracts import ActivationName, ExpertKernel, ExpertSpec, RouteSpec
from xpar.kernels.cpu import (
    experts_native,
    experts_native_quantised,
    experts_onednn,
    experts_zen,
    quantised_library,
)
from xpar.kernels.cpu.experts_native import NativeExperts
from xpar.kernels.cpu.experts_native_quantised import NativeQuantisedExperts
from xpar.kernels.cpu.experts_onednn import OneDnnExperts
from xpar.kernels.cpu.experts_zen import ZenExperts
from xpar.kernels.gpu import availability as gpu
from xpar.kernels.gpu import code_tables
from xpar.kernels.quantised_weight import WeightFormat
from xpar.kernels.reference import ReferenceExperts


@dataclass(frozen=True)
class FusedRouting:
    """The routings that a kernel covers if it routes, computes and combines in one call.

    Attributes:
        scorings: the scoring functions it routes by, without groups and correction bias.
        tokens: number of tokens up to which one call is faster than the single stages.
        measured: how much faster, with shape and machine.
    """

    scorings: tuple[str, ...]
    tokens: int
    measured: str

    def why_not(self, route: RouteSpec) -> str | None:
        """Return the reason why one call cannot route by ``route``, or None."""
        if route.other is not None:
            return f"does not route with {route.other}"
        if route.scoring not in self.scorings:
            return f"routes by {_join_names(self.scorings)}, not by {route.scoring}"
        if route.num_expert_group > 1 or route.correction_bias:
            return "routes without groups and correction bias"
        return None


@dataclass(frozen=True)
class KernelEntry:
    """One kernel of the registry and its abilities.

    Attributes:
        name: the kernel's name in options and reports.
        devices: torch device types.
        dtypes: dtypes that it computes in.
        activations: names of the plain gated activations that it has.
        row_invariant: True if it can promise what ``ExpertSpec.row_invariant`` asks.
        why_unavailable: returns the reason why this machine or a spec's shape rules it out, or None; imports
            nothing heavy.
        build: makes the kernel, without weights.
        measured: how fast it was, with shape and machine.
        all_activations: True if it has every other form of :class:`~xpar.kernels.contracts.Activation`, too.
        fused_routing: the routings that it covers besides computing, or None. If set, the kernels that
            ``build`` makes are :class:`~xpar.kernels.contracts.FusedRoutingKernel`.
        why_not_format: returns the reason why it cannot compute from weights of a quantised format, or None.
        why_unsuitable: returns the reason why ``auto`` prefers a later entry although this one could serve,
            or None.
        quantises_inputs: True if, with quantised weights, it computes by ``ExpertSpec.activation_scheme`` and
            takes rows that were quantised before.
    """

    name: str
    devices: tuple[str, ...]
    dtypes: tuple[torch.dtype, ...]
    activations: tuple[ActivationName, ...]
    row_invariant: bool
    why_unavailable: Callable[[ExpertSpec], str | None]
    build: Callable[[ExpertSpec], ExpertKernel]
    measured: str
    all_activations: bool = False
    fused_routing: FusedRouting | None = None
    why_not_format: Callable[[WeightFormat], str | None] = lambda fmt: f"does not compute from {fmt} weights"
    why_unsuitable: Callable[[ExpertSpec], str | None] = lambda spec: None
    quantises_inputs: bool = False

    def why_not(self, spec: ExpertSpec) -> str | None:
        """Return the reason why this kernel cannot serve ``spec``, or None."""
        device = spec.device.split(":")[0]
        if device not in self.devices:
            return f"runs on {_join_names(self.devices)}, not on {device}"
        if spec.dtype not in self.dtypes:
            return f"computes in {_join_names(self.dtypes)}, not in {_join_names([spec.dtype])}"
        is_listed = spec.activation.is_plain and spec.activation.name in self.activations
        if not is_listed and not self.all_activations:
            return f"has activations {_join_names(self.activations)}, not {spec.activation}"
        if spec.row_invariant and not self.row_invariant:
            return "a row's bits may depend on the rest of the batch, which exact mode rules out"
        if spec.weight_format is not None and (reason := self.why_not_format(spec.weight_format)):
            return reason
        return self.why_unavailable(spec)


_FLOATS = (torch.bfloat16, torch.float16, torch.float32)
_GATED: tuple[ActivationName, ...] = ("silu", "gelu", "gelu_tanh")
# Ratios of minimum times, interleaved in one process: H 2048, I 1024, E 64, k 8, bf16, 2 threads of an EPYC
# (Zen 5).
_OLMOE = (
    "faster than transformers' better experts at 1 / 4 / 16 / 64 / 256 / 1024 tokens (OLMoE, bf16, 2 cores"
)
# Those of "a Xeon", which has no avx512_bf16: by xpar bench layer olmoe --compare transformers.
_STAGES = "x faster than the stages one by one at 1 / 2 / 4 tokens (OLMoE, bf16,"
# Those to the single stages: by --compare steps of the same command.
_STAGES_EPYC, _STAGES_XEON = f"{_STAGES} 1 thread of a loaded machine)", f"{_STAGES} 2 threads of that Xeon)"

# Fastest first: the first that serves a spec is chosen. Kernels of quantised weights compete with no others.
KERNELS: tuple[KernelEntry, ...] = (
    KernelEntry(
        name="zentorch",
        devices=("cpu",),
        dtypes=(torch.bfloat16,),
        activations=_GATED,
        row_invariant=False,
        why_unavailable=experts_zen.why_unavailable,
        build=ZenExperts,
        fused_routing=FusedRouting(("softmax",), tokens=4, measured=f"1.03 / 1.02 / 1.06 {_STAGES_EPYC}"),
        measured=f"2.1 / 1.9 / 1.8 / 1.8 / 1.5 / 1.2 x {_OLMOE})",
    ),
    KernelEntry(
        name="native",
        devices=("cpu",),
        dtypes=(torch.bfloat16,),
        activations=_GATED,
        row_invariant=True,
        why_unavailable=experts_native.why_unavailable,
        build=NativeExperts,
        all_activations=True,
        fused_routing=FusedRouting(("softmax",), tokens=4, measured=f"1.03 / 1.02 / 1.02 {_STAGES_XEON}"),
        measured=f"1.9 / 2.3 / 2.8 / 5.3 / 5.0 / 4.2 x {_OLMOE} of a Xeon); "
        "onednn there 1.2 / 1.1 / 1.0 / 1.1 / 1.0 / 1.0; with bfloat16 arithmetic (an EPYC, Zen 4) 1.4 / "
        "1.6 / 1.7 / 1.7 x as fast as onednn, 0.8 / 0.9 / 0.9 / 1.0 x as zentorch at 1 / 4 / 16 / 96 tokens",
    ),
    KernelEntry(
        name="onednn",
        devices=("cpu",),
        dtypes=_FLOATS,
        activations=_GATED,
        row_invariant=True,
        why_unavailable=experts_onednn.why_unavailable,
        build=OneDnnExperts,
        all_activations=True,
        fused_routing=FusedRouting(("softmax",), tokens=4, measured=f"1.08 / 1.01 / 1.01 {_STAGES_EPYC}"),
        measured=f"1.4 / 1.4 / 1.3 / 1.4 / 1.3 / 1.2 x {_OLMOE})",
    ),
    KernelEntry(
        name="native-quantised",
        devices=("cpu",),
        dtypes=(torch.bfloat16,),
        activations=_GATED,
        row_invariant=True,
        why_unavailable=experts_native_quantised.why_unavailable,
        build=NativeQuantisedExperts,
        why_not_format=quantised_library.why_not_format,
        all_activations=True,
        fused_routing=FusedRouting(("softmax",), tokens=4, measured="as native; not measured itself"),
        measured="fp8 1.2 / 1.4 / 0.8, int4 1.6 / 2.2 / 1.3 x as fast as zentorch in bf16 "
        "at 1 / 4 / 64 tokens (OLMoE, 2 threads of an EPYC, Zen 4)",
    ),
    KernelEntry(
        name="triton",
        devices=("cuda",),
        dtypes=_FLOATS,
        activations=_GATED,
        row_invariant=True,
        why_unavailable=gpu.why_unavailable,
        build=gpu.build,
        why_not_format=code_tables.why_not_format,
        all_activations=True,
        quantises_inputs=True,
        measured="measure with xpar bench kernels",
    ),
    KernelEntry(
        name="reference",
        devices=("cpu", "cuda"),
        dtypes=_FLOATS,
        activations=_GATED,
        row_invariant=False,
        why_unavailable=lambda spec: None,
        build=ReferenceExperts,
        why_not_format=lambda fmt: None,
        all_activations=True,
        # A kernel that computes from converted weights is faster by far.
        why_unsuitable=lambda spec: "keeps float32 copies" if spec.weight_format else None,
        quantises_inputs=True,
        measured="the definition, not made to be fast",
    ),
)


def choose_kernel(
    spec: ExpertSpec, name: str = "auto", kernels: tuple[KernelEntry, ...] = KERNELS
) -> Choice[KernelEntry]:
    """Choose the first of ``kernels`` that serves ``spec``, or the one called ``name``.

    Args:
        spec: the requirements of the layer.
        name: a kernel's name, or "auto".
        kernels: the candidates, the fastest first.

    Returns:
        The entry (``chosen``) and the reasons against the others; ``explain()`` describes both.

    Raises:
        ValueError: no kernel serves ``spec``, or the named one does not; the message has every reason.

    Example:
        >>> spec = ExpertSpec(2, 4, 8, torch.float32, Activation("relu2", gated=False))  # E 2, H 4, I 8
        >>> kernel = choose_kernel(spec).chosen.build(spec)
        >>> for expert in range(2):
        ...     kernel.load_expert(expert, gate_up=torch.ones(8, 4), down=torch.ones(4, 8))
        >>> topk_ids = torch.tensor([[0, 1], [1, -1], [-1, -1]], dtype=torch.int32)  # 3 tokens, 2 slots each
        >>> kernel.compute(ExpertInput(torch.ones(3, 4), topk_ids, torch.full((3, 2), 0.5)))[:, 0]
        tensor([128.,  64.,   0.])
    """
    try:
        choice = choose(
            kernels,
            refuses=lambda entry: entry.why_not(spec),
            prefers_another=lambda entry: entry.why_unsuitable(spec),
            name=name,
            option="kernel",
            outranked="measured slower than {chosen}",
        )
    except ValueError as error:
        if name != "auto":
            raise
        raise ValueError(f"no kernel serves {spec}: {error}") from None
    return replace(choice, reason="; ".join(filter(None, (choice.chosen.measured, choice.reason))))


def choose_quantised_kernel(
    spec: ExpertSpec,
    fmt: WeightFormat,
    name: str = "auto",
    kernels: tuple[KernelEntry, ...] = KERNELS,
) -> tuple[ExpertSpec, Choice[KernelEntry]]:
    """Choose a kernel that computes from weights in ``fmt``, or else one that takes them converted.

    Args:
        spec: the requirements of the layer, with weights in plain numbers.
        fmt: the format in which its weights are stored.
        name: a kernel's name, or "auto". A named kernel that does not take ``fmt`` gets converted weights.
        kernels: the candidates, the fastest first.

    Returns:
        What the kernel has to be built for, with ``weight_format`` if the weights stay as they are; and the
        choice, whose reasons say why each of the others does not take ``fmt``.

    Raises:
        ValueError: no kernel serves ``spec`` either way.
    """
    quantised = replace(spec, weight_format=fmt)
    against = {entry.name: entry.why_not(quantised) or entry.why_unsuitable(quantised) for entry in kernels}
    if name == "auto" and not any(reason is None for reason in against.values()):
        choice = choose_kernel(spec, name, kernels)
        rejected = tuple((other, against[other] or reason) for other, reason in choice.rejected)
        return spec, replace(choice, rejected=rejected)
    named = next((entry for entry in kernels if entry.name == name), None)
    if named is not None and named.why_not(quantised) is not None:
        return spec, choose_kernel(spec, name, kernels)
    return quantised, choose_kernel(quantised, name, kernels)


def _join_names(values: Iterable[object]) -> str:
    return ", ".join(str(value).removeprefix("torch.") for value in values)
