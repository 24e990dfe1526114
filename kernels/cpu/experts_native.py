"""Experts by this package's own compiled code, in bfloat16 arithmetic where the processor has it.

The gate-up products of all experts are one call, so are the down products; the activation of all slots lies
between.
"""

import torch
from torch import Tensor

from xpar.kernels.activations import activate
from xpar.kernels.contracts import (
    ExpertInput,
    ExpertSpec,
    RouteSpec,
    Routing,
    check_expert_weights,
    require_loaded,
)
from xpar.kernels.cpu import native_library
from xpar.kernels.cpu.native_library import PackedWeights, Span
from xpar.kernels.cpu.sorted_slots import SortedSlots
from xpar.kernels.rows import group_by_expert
from xpar.kernels.stable_topk import route_few_tokens


def why_unavailable(spec: ExpertSpec) -> str | None:
    """Return the reason why this kernel cannot serve ``spec`` on this machine, or None."""
    return native_library.why_unavailable()


class SpanExperts(SortedSlots):
    """A base class of kernels that compute the slots of all experts in two calls, one for each product."""

    spec: ExpertSpec
    _missing: set[int]

    def route_and_compute(
        self, hidden_states: Tensor, router_logits: Tensor, route: RouteSpec
    ) -> tuple[Tensor, Routing]:
        routing = route_few_tokens(router_logits, route)
        return self.compute(ExpertInput(hidden_states, routing.topk_ids, routing.topk_weights)), routing

    def _sorted_slots(self, x: ExpertInput) -> tuple[Tensor, Tensor]:
        if x.topk_ids.shape[0] == 1:
            return self._slots_of_one_entry(x)
        groups = group_by_expert(x.topk_ids, self.spec.num_experts)
        source = groups.entry if x.rows is None else x.rows[groups.entry]
        return self._compute_spans(x.hidden_states, groups.spans(), source), groups.positions

    def _slots_of_one_entry(self, x: ExpertInput) -> tuple[Tensor, Tensor]:
        """Compute a single entry, whose slots go to different experts: nothing needs sorting."""
        experts = [expert for expert in x.topk_ids[0].tolist() if expert >= 0]
        row = torch.zeros(1, dtype=torch.int64) if x.rows is None else x.rows
        source = row.expand(len(experts)).contiguous()
        positions = (x.topk_ids >= 0).cumsum(1).sub_(1).masked_fill_(x.topk_ids < 0, -1)
        spans = [(expert, at, at + 1) for at, expert in enumerate(experts)]
        return self._compute_spans(x.hidden_states, spans, source), positions

    def _compute_spans(self, hidden_states: Tensor, spans: list[Span], source: Tensor) -> Tensor:
        """Return the outputs [S, H] of sorted slots; slot s reads ``hidden_states[source[s]]``."""
        require_loaded(self._missing.intersection(expert for expert, _, _ in spans))
        return self._compute_loaded(hidden_states, spans, source)

    def _compute_loaded(self, hidden_states: Tensor, spans: list[Span], source: Tensor) -> Tensor:
        raise NotImplementedError


class NativeExperts(SpanExperts):
    """An expert kernel in bfloat16 for x86 with AVX2 and FMA, or AVX-512.

    Implements :class:`~xpar.kernels.contracts.FusedRoutingKernel`.
    """

    name = "native"

    def __init__(self, spec: ExpertSpec) -> None:
        self.spec = spec
        e, h, i, isa = spec.num_experts, spec.hidden_size, spec.intermediate_size, native_library.best_set()
        self._gate_up = PackedWeights(e, spec.activation.gate_up_rows(i), h, spec.bias, isa)
        self._down = PackedWeights(e, h, i, spec.bias, isa)
        self._missing = set(range(e))

    def load_expert(
        self,
        index: int,
        gate_up: Tensor,
        down: Tensor,
        gate_up_bias: Tensor | None = None,
        down_bias: Tensor | None = None,
    ) -> None:
        check_expert_weights(self.spec, index, gate_up, down, gate_up_bias, down_bias)
        self._gate_up.load(index, gate_up, gate_up_bias)
        self._down.load(index, down, down_bias)
        self._missing.discard(index)

    def nbytes(self) -> int:
        return self._gate_up.nbytes() + self._down.nbytes()

    def _compute_loaded(self, hidden_states: Tensor, spans: list[Span], source: Tensor) -> Tensor:
        gate_up_rows = self._gate_up.multiply(hidden_states, spans, source)
        hidden = activate(gate_up_rows, self.spec.activation, self.spec.row_invariant)
        return self._down.multiply(hidden, spans)
