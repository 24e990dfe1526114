"""The values that pass between the rooms: what routing decided, what the experts get, what an expert kernel is.

Shapes use one legend everywhere: T tokens on this rank, H hidden size, I expert width on this rank,
E experts on this rank, k slots per token, M entries handed to a kernel, S active slots among them.
"""

from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

Activation = Literal["silu", "gelu", "gelu_tanh"]


@dataclass(frozen=True)
class Routing:
    """Which experts each token goes to, and with what weight.

    ``topk_ids``: [T, k] int32, global expert ids; -1 marks a dropped slot, which is neither sent nor counted.
    ``topk_weights``: [T, k] float32; the weight of a dropped slot is ignored.
    """

    topk_ids: Tensor
    topk_weights: Tensor


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
    rows are in the batch (``exact`` mode needs this).
    """

    num_experts: int
    hidden_size: int
    intermediate_size: int
    dtype: torch.dtype
    activation: Activation
    device: str = "cpu"
    row_invariant: bool = False


class ExpertKernel(Protocol):
    """Holds one rank's expert weights in the layout it wants and computes with them.

    The arithmetic is that of :mod:`xpar.kernels.reference`: ``y = down(act(gate(x)) * up(x))`` per slot,
    fp32 accumulation, the router weight applied in fp32, one cast to ``spec.dtype`` at the end.
    """

    name: str
    spec: ExpertSpec

    def load_expert(self, index: int, gate_up: Tensor, down: Tensor) -> None:
        """Take expert ``index``: ``gate_up`` [2I, H] (gate rows, then up rows), ``down`` [H, I]. Keeps no view."""

    def compute(self, x: ExpertInput, out: Tensor | None = None) -> Tensor:
        """[M, H] in ``spec.dtype``: for each entry the weighted sum over its local slots, zero if it has none."""

    def compute_slots(self, x: ExpertInput) -> Tensor:
        """[S, H] in ``spec.dtype``: each active slot's output, unweighted, in (entry, slot) order."""

    def nbytes(self) -> int:
        """Bytes of weights held."""
