"""The values that pass between the rooms, and the protocol of expert kernels.

Shapes use these letters in every room:

- T: tokens of this rank. H: hidden size. I: width of an expert, or of this rank's slice of every expert.
- E: experts; of a kernel those of this rank. k: slots of a token, one for each expert that the token goes to.
- M: entries that a kernel gets, one for each dispatched token. S: active slots, those with an expert on this
  rank.
- R: ranks. N: rows of any other kind; of a dense layer's weight [N, K] the outputs, with K inputs.
"""

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from xpar.kernels.quantised_weight import ActivationScheme, QuantisedWeight, WeightFormat
from xpar.kernels.row_format import RowFormat

ActivationName = Literal["silu", "gelu", "gelu_tanh", "relu2", "swiglustep", "situ"]


@dataclass(frozen=True)
class Activation:
    """The function between an expert's two products.

    Formulas: :mod:`xpar.kernels.activations`.

    Models that need each function: gated ``silu`` Mixtral, Qwen, DeepSeek and most others; ``silu`` with a
    limit DeepSeek-V4, with limit, alpha and beta gpt-oss (7, 1.702, 1); ``gelu_tanh`` Gemma-4; ``relu2``
    without a gate Nemotron-H; ``swiglustep`` Step-3.5-Flash (limit 7); ``situ`` Kimi-K3 (beta 4, limit 25);
    ``gelu``, and the other forms without a gate, checkpoints whose ``hidden_act`` names them. xpar has no
    family for Step-3.5-Flash and Kimi-K3 yet.

    Attributes:
        gated: True if the first product is [.., 2I], the gate half first, and the up half multiplies the
            activated gate; False if the first product is [.., I].
        limit: bound of the gate and of the up half; None for no bound.
        alpha: factor on the gate inside the sigmoid of ``silu``.
        beta: addend of the up half of ``silu``; bound of the gate of ``situ``.

    Raises:
        ValueError: no formula has this combination of parameters.

    Example:
        >>> Activation("silu", limit=7.0, alpha=1.702, beta=1.0).gate_up_rows(64)
        128
    """

    name: ActivationName
    gated: bool = True
    limit: float | None = None
    alpha: float = 1.0
    beta: float = 0.0

    def __post_init__(self) -> None:
        parametrised = self.limit is not None or self.alpha != 1.0 or self.beta != 0.0
        if parametrised and (not self.gated or self.name not in ("silu", "swiglustep", "situ")):
            raise ValueError(f"{self}: only gated silu, swiglustep and situ have a limit, alpha or beta")
        if self.limit is not None and not self.limit > 0:
            raise ValueError(f"{self}: limit={self.limit} must be positive, or None for none")
        if self.name == "relu2" and self.gated:
            raise ValueError(f"{self}: relu2 has no gate; set gated=False")
        if self.name in ("swiglustep", "situ") and not self.gated:
            raise ValueError(f"{self}: {self.name} needs a gate; set gated=True")
        if self.name == "swiglustep" and self.limit is None:
            raise ValueError(f"{self}: swiglustep needs a limit")
        if self.name == "situ" and not self.beta > 0:
            raise ValueError(f"{self}: situ needs beta > 0, the bound of its gate")

    @property
    def is_plain(self) -> bool:
        """True if the name alone says what the activation is: gated, without bounds and parameters."""
        return self == Activation(self.name) if self.name in ("silu", "gelu", "gelu_tanh") else False

    def gate_up_rows(self, width: int) -> int:
        """Return the rows of the first weight of an expert of ``width`` I: 2I with a gate, else I."""
        return 2 * width if self.gated else width

    def __str__(self) -> str:
        parts = [] if self.gated else ["no gate"]
        parts += [] if self.limit is None else [f"limit {self.limit:g}"]
        if self.alpha != 1.0 or self.beta != 0.0:
            parts.append(f"alpha {self.alpha:g}, beta {self.beta:g}")
        return self.name + (f" ({', '.join(parts)})" if parts else "")


@dataclass(frozen=True)
class Routing:
    """The experts that each token goes to, and their weights.

    Attributes:
        topk_ids: [T, k] int32, global expert ids; -1 marks a dropped slot, which is neither sent nor counted.
        topk_weights: [T, k] float32; the weight of a dropped slot is ignored.
        weight_on_input: True if the weights multiply the tokens before their experts, not the outputs; then k
            = 1.
        identity_weights: [T] float32, the factor on the token itself in its output (identity experts), or
            None.
    """

    topk_ids: Tensor
    topk_weights: Tensor
    weight_on_input: bool = False
    identity_weights: Tensor | None = None


@dataclass(frozen=True)
class RouteSpec:
    """The rule by which a kernel that routes by itself chooses k of E experts.

    Equal scores are ordered by expert id.

    Attributes:
        scoring: the function that makes scores of the logits.
        among_chosen: True if only the logits of the chosen experts are scored.
        renormalize: True if the weights are divided by their sum, of at least ``renormalize_min``.
        scale: the factor on the weights, after renormalization.
        num_expert_group: number of groups; if more than 1, experts are chosen within the best groups only.
        correction_bias: True if a bias per expert takes part in the choice.
        other: anything else that the router does, in words, or None.
    """

    top_k: int
    scoring: str = "softmax"
    among_chosen: bool = False
    renormalize: bool = True
    renormalize_min: float = 1e-20
    scale: float = 1.0
    num_expert_group: int = 1
    correction_bias: bool = False
    other: str | None = None


@dataclass(frozen=True)
class ExpertInput:
    """The rows that a rank's experts compute with after dispatch.

    Attributes:
        hidden_states: [N, H], contiguous; if ``row_format`` is set, [N, W] int32 words in that format. Only
            rows that an entry names are read.
        topk_ids: [M, k] int32, *local* expert of each slot; -1 if the slot's expert is on another rank.
        topk_weights: [M, k] float32.
        rows: [M] int64, the row of ``hidden_states`` that entry m reads; None if entry m reads row m.
        row_format: the codes and scales that rows consist of, or None for plain numbers. Only a kernel with
            an ``ExpertSpec.activation_scheme`` gets such rows, quantised by that scheme.
    """

    hidden_states: Tensor
    topk_ids: Tensor
    topk_weights: Tensor
    rows: Tensor | None = None
    row_format: RowFormat | None = None


@dataclass(frozen=True)
class Slots:
    """Outputs of all slots, unweighted: ``rows`` [M k, H], slot j of entry m at m k + j, undefined for -1."""

    rows: Tensor


@dataclass(frozen=True)
class ExpertSpec:
    """The requirements on an expert kernel.

    Attributes:
        num_experts: E, the experts of this rank.
        hidden_size: H.
        intermediate_size: I on this rank, after any tensor-parallel slicing.
        row_invariant: True if the bits of a row's result must not depend on the other rows of the batch, as
            ``exact`` mode needs.
        bias: True if both products add a bias.
        weight_format: codes and scales that the kernel keeps and computes from; None for weights in
            ``dtype``.
        activation_scheme: the way in which a kernel that keeps codes may quantise the inputs of both
            products, too; None, and ``row_invariant``, leave the inputs as they are. The kernel then also
            takes rows that were quantised before they came.
        routed_experts: the experts of all ranks, among which tokens choose; None if all are here. It only
            says how many slots of a batch to expect here.
    """

    num_experts: int
    hidden_size: int
    intermediate_size: int
    dtype: torch.dtype
    activation: Activation
    device: str = "cpu"
    row_invariant: bool = False
    bias: bool = False
    weight_format: WeightFormat | None = None
    activation_scheme: ActivationScheme | None = None
    routed_experts: int | None = None


class ExpertKernel(Protocol):
    """A kernel that keeps one rank's expert weights in its own layout and computes with them.

    The arithmetic is that of :mod:`xpar.kernels.reference`: ``y = down(act(gate_up(x)))`` per slot. Sums are
    float32, the biases are added before the float32 router weight multiplies, and the result is cast once, to
    ``spec.dtype``.
    """

    name: str
    spec: ExpertSpec

    def load_expert(
        self,
        index: int,
        gate_up: Tensor,
        down: Tensor,
        gate_up_bias: Tensor | None = None,
        down_bias: Tensor | None = None,
    ) -> None:
        """Copy the weights of expert ``index`` into the kernel; the kernel keeps no view of them.

        Args:
            index: local expert id, 0 to E - 1.
            gate_up: [2I, H], gate rows, then up rows; [I, H] without a gate.
            down: [H, I].
            gate_up_bias: [2I] or [I] if ``spec.bias``, else None.
            down_bias: [H] if ``spec.bias``, else None.

        Raises:
            ValueError: ``index`` or a shape does not fit ``spec``.
        """

    def compute(self, x: ExpertInput, out: Tensor | None = None) -> Tensor:
        """Return each entry's weighted sum over its active slots, zero without any: [M, H].

        The dtype is ``spec.dtype``. The result is written into ``out`` [M, H] if that is given. Raises
        RuntimeError if an expert has no weights.
        """

    def compute_slots(self, x: ExpertInput) -> Tensor:
        """Return each active slot's output in ``spec.dtype``, unweighted, in slot order: [S, H]."""

    def nbytes(self) -> int:
        """Return the bytes that the weights occupy."""


@runtime_checkable
class SlotKernel(Protocol):
    """An expert kernel that can leave the sum over slots to whoever brings the results home."""

    def compute_unsummed(self, x: ExpertInput, exact: bool = False) -> Tensor | Slots:
        """Compute all slots where they lie, without waiting for the device.

        Where the kernel sums very small batches at no cost it returns the sums, [M, H]; never with ``exact``.
        """


@runtime_checkable
class QuantisedKernel(ExpertKernel, Protocol):
    """An expert kernel that keeps and computes from codes and scales, if ``spec.weight_format`` is set.

    The arithmetic is that of the dequantised weights, with what the registry entry says about activations.
    """

    def load_quantised(
        self,
        index: int,
        gate_up: QuantisedWeight,
        down: QuantisedWeight,
        gate_up_bias: Tensor | None = None,
        down_bias: Tensor | None = None,
    ) -> None:
        """Copy the weights of expert ``index`` into the kernel, as :meth:`ExpertKernel.load_expert` does.

        Args:
            index: local expert id, 0 to E - 1.
            gate_up: [2I, H] or [I, H] in ``spec.weight_format``.
            down: [H, I] in the same format.
            gate_up_bias: [2I] or [I] if ``spec.bias``, else None.
            down_bias: [H] if ``spec.bias``, else None.

        Raises:
            ValueError: ``index``, a format or a shape does not fit ``spec``.
        """


class FusedRoutingKernel(ExpertKernel, Protocol):
    """An expert kernel that can also route and combine, if it has all experts of the layer.

    :class:`~xpar.kernels.registry.FusedRouting` in the kernel's registry entry says which routings it covers.
    """

    def route_and_compute(
        self, hidden_states: Tensor, router_logits: Tensor, route: RouteSpec
    ) -> tuple[Tensor, Routing]:
        """Route, compute and combine tokens [T, H] by finite logits [T, E]: sums [T, H] and routing.

        ``route``: a rule that the registry entry does not refuse.
        """


def check_expert_weights(
    spec: ExpertSpec,
    index: int,
    gate_up: Tensor | QuantisedWeight,
    down: Tensor | QuantisedWeight,
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
) -> None:
    """Raise ValueError unless ``index``, the format and the shapes of the weights fit ``spec``.

    The arguments are those of :meth:`ExpertKernel.load_expert`.
    """
    if not 0 <= index < spec.num_experts:
        raise ValueError(f"expert {index}: this rank holds experts 0 to {spec.num_experts - 1}")
    rows = spec.activation.gate_up_rows(spec.intermediate_size)
    expected: dict[str, tuple[Tensor | QuantisedWeight | None, tuple[int, ...] | None]] = {
        "gate_up": (gate_up, (rows, spec.hidden_size)),
        "down": (down, (spec.hidden_size, spec.intermediate_size)),
        "gate_up_bias": (gate_up_bias, (rows,) if spec.bias else None),
        "down_bias": (down_bias, (spec.hidden_size,) if spec.bias else None),
    }
    for name, (tensor, shape) in expected.items():
        found = None if tensor is None else tuple(tensor.shape)
        if found != shape:
            raise ValueError(f"expert {index}: {name} is {found}, expected {shape}")
    for name, weight in (("gate_up", gate_up), ("down", down)):
        given = weight.format if isinstance(weight, QuantisedWeight) else None
        if given != spec.weight_format:
            raise ValueError(
                f"expert {index}: {name} is in {given or 'plain numbers'}, the kernel was built for "
                f"{spec.weight_format or 'plain numbers'}"
            )


def require_loaded(missing: Collection[int]) -> None:
    """Raise RuntimeError unless ``missing``, the experts that lack weights, is empty."""
    if missing:
        index = min(missing)
        raise RuntimeError(f"expert {index} has tokens but no weights: call load_expert({index}, ...) first")


def require_finite(
    tensor: Tensor, message: Callable[[Tensor], str], error: type[Exception] = ValueError
) -> None:
    """Raise ``error`` if a value of ``tensor`` is NaN or infinite; waits for a GPU.

    ``message`` makes the text from the mask of the values that are not finite, in the tensor's shape.
    """
    # One sum runs at memory speed and is finite only if every term is; if finite terms overflow, the mask
    # decides.
    if math.isfinite(float(tensor.sum())):
        return
    bad = ~torch.isfinite(tensor)
    if bool(bad.any()):
        raise error(message(bad))
