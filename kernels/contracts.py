"""The values that pass between the rooms: what routing decided, what the experts get, what an expert kernel is.

Shapes use one legend everywhere: T tokens on this rank, H hidden size, I expert width on this rank,
E experts on this rank, k slots per token, M entries handed to a kernel, S active slots among them.
"""

from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

ActivationName = Literal["silu", "gelu", "gelu_tanh", "relu2", "swiglustep", "situ"]


@dataclass(frozen=True)
class Activation:
    """The function between an expert's two products; formulas in :mod:`xpar.kernels.activations`.

    ``gated``: the first product is [.., 2I], the gate half first, and the up half multiplies the result; otherwise it
    is [.., I]. ``limit``: bound of the gate and of the up half, None for none. ``alpha``, ``beta``: parameters of
    ``silu`` (gpt-oss: 1.702 and 1) and of ``situ``; their defaults make ``silu`` the plain one.
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
    def plain(self) -> bool:
        """Whether its name alone says what it is: gated, no bounds, no parameters."""
        return self == Activation(self.name) if self.name in ("silu", "gelu", "gelu_tanh") else False

    def packed(self, width: int) -> int:
        """Rows of the first weight for an expert of ``width`` I."""
        return 2 * width if self.gated else width

    def __str__(self) -> str:
        parts = [] if self.gated else ["no gate"]
        parts += [] if self.limit is None else [f"limit {self.limit:g}"]
        if self.alpha != 1.0 or self.beta != 0.0:
            parts.append(f"alpha {self.alpha:g}, beta {self.beta:g}")
        return self.name + (f" ({', '.join(parts)})" if parts else "")


@dataclass(frozen=True)
class Routing:
    """Which experts each token goes to, and with what weight.

    ``topk_ids``: [T, k] int32, global expert ids; -1 marks a dropped slot, which is neither sent nor counted.
    ``topk_weights``: [T, k] float32; the weight of a dropped slot is ignored.
    ``weight_on_input``: the weights multiply the tokens before their experts, not the outputs; k = 1.
    ``identity_weights``: [T] float32, how much of itself each token's output holds (identity experts), or None.
    """

    topk_ids: Tensor
    topk_weights: Tensor
    weight_on_input: bool = False
    identity_weights: Tensor | None = None


@dataclass(frozen=True)
class RouteSpec:
    """What a kernel must do in order to route by itself: score E logits, take the k best, equal ones by expert id.

    ``scoring``: what makes scores of logits. ``among_chosen``: only the chosen ones are scored. ``renormalize``: the
    weights are divided by their sum, taken as ``renormalize_min`` at least; then they are multiplied by ``scale``.
    ``num_expert_group``: more than 1 where experts are chosen within the best groups. ``correction_bias``: a bias takes
    part in the choice. ``other``: what else the router does, in words, or None.
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
    """What a rank's experts work on after dispatch.

    ``hidden_states``: [N, H], contiguous. Only rows that an entry names are read.
    ``topk_ids``: [M, k] int32, *local* expert of each slot; -1 where the slot's expert is on another rank.
    ``topk_weights``: [M, k] float32.
    ``rows``: [M] int64, the row of ``hidden_states`` that entry m reads; None means entry m reads row m.
    """

    hidden_states: Tensor
    topk_ids: Tensor
    topk_weights: Tensor
    rows: Tensor | None = None


@dataclass(frozen=True)
class ExpertSpec:
    """What an expert kernel must be able to do.

    ``num_experts``: experts held by this rank. ``hidden_size``: H. ``intermediate_size``: I on this rank, after
    any tensor-parallel slicing. ``row_invariant``: a row's result must not depend, bit for bit, on which other
    rows are in the batch (``exact`` mode needs this). ``bias``: both products add a bias.
    """

    num_experts: int
    hidden_size: int
    intermediate_size: int
    dtype: torch.dtype
    activation: Activation
    device: str = "cpu"
    row_invariant: bool = False
    bias: bool = False


class ExpertKernel(Protocol):
    """Holds one rank's expert weights in the layout it wants and computes with them.

    The arithmetic is that of :mod:`xpar.kernels.reference`: ``y = down(act(gate_up(x)))`` per slot, fp32
    accumulation, biases before the router weight, that in fp32, one cast to ``spec.dtype`` at the end.
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
        """Take expert ``index``; keeps no view.

        ``gate_up`` [2I, H], gate rows, then up rows ([I, H] without a gate), ``down`` [H, I]; and if ``spec.bias``,
        ``gate_up_bias`` [2I] or [I], ``down_bias`` [H].
        """

    def compute(self, x: ExpertInput, out: Tensor | None = None) -> Tensor:
        """[M, H] in ``spec.dtype``: for each entry the weighted sum over its local slots, zero if it has none."""

    def compute_slots(self, x: ExpertInput) -> Tensor:
        """[S, H] in ``spec.dtype``: each active slot's output, unweighted, in (entry, slot) order."""

    def nbytes(self) -> int:
        """Bytes of weights held."""


class OneCallKernel(ExpertKernel, Protocol):
    """A kernel that holds every expert and, where its record says so, covers more steps than its own in one call."""

    def route_and_compute(
        self, hidden_states: Tensor, router_logits: Tensor, route: RouteSpec
    ) -> tuple[Tensor, Routing]:
        """Route, compute, combine: the experts' weighted sum [T, H] of [T, H], and the routing behind it.

        ``router_logits``: [T, E], finite.
        """
