"""Experts by the package's own compiled code, for processors without arithmetic in bfloat16.

One product for the gate-up weights of all experts, one for their down weights; between them, the activation of all slots.
"""

import torch
from torch import Tensor

from xpar.kernels import rows
from xpar.kernels.activations import activate
from xpar.kernels.checks import check_expert, check_loaded
from xpar.kernels.contracts import ExpertInput, ExpertSpec, RouteSpec, Routing
from xpar.kernels.cpu import native_library
from xpar.kernels.cpu.native_library import PackedWeights, Span
from xpar.kernels.cpu.select import route_few_tokens
from xpar.kernels.cpu.sorted_slots import SortedSlots


def unavailable(spec: ExpertSpec) -> str | None:
    """Why this kernel cannot serve ``spec`` here, or None."""
    return native_library.refused()


class NativeExperts(SortedSlots):
    """See :class:`xpar.kernels.contracts.ExpertKernel`. bfloat16 on x86 with AVX2 and FMA, or AVX-512."""

    name = "native"

    def __init__(self, spec: ExpertSpec) -> None:
        self.spec = spec
        e, h, i, lanes = spec.num_experts, spec.hidden_size, spec.intermediate_size, native_library.lanes()
        self._gate_up = PackedWeights(e, spec.activation.packed(i), h, spec.bias, lanes)
        self._down = PackedWeights(e, h, i, spec.bias, lanes)
        self._missing = set(range(e))

    def load_expert(
        self,
        index: int,
        gate_up: Tensor,
        down: Tensor,
        gate_up_bias: Tensor | None = None,
        down_bias: Tensor | None = None,
    ) -> None:
        check_expert(self.spec, index, gate_up, down, gate_up_bias, down_bias)
        self._gate_up.load(index, gate_up, gate_up_bias)
        self._down.load(index, down, down_bias)
        self._missing.discard(index)

    def route_and_compute(
        self, hidden_states: Tensor, router_logits: Tensor, route: RouteSpec
    ) -> tuple[Tensor, Routing]:
        routing = route_few_tokens(router_logits, route)
        return self.compute(ExpertInput(hidden_states, routing.topk_ids, routing.topk_weights)), routing

    def nbytes(self) -> int:
        return self._gate_up.nbytes() + self._down.nbytes()

    def _sorted_slots(self, x: ExpertInput) -> tuple[Tensor, Tensor]:
        if x.topk_ids.shape[0] == 1:
            return self._single(x)
        groups = rows.group_by_expert(x.topk_ids, self.spec.num_experts)
        source = groups.entry if x.rows is None else x.rows[groups.entry]
        return self._slots(x.hidden_states, groups.spans(), source), groups.positions

    def _single(self, x: ExpertInput) -> tuple[Tensor, Tensor]:
        """Of one entry, whose slots go to different experts in any order, so that nothing needs sorting."""
        experts = [expert for expert in x.topk_ids[0].tolist() if expert >= 0]
        source = (
            (torch.zeros(1, dtype=torch.int64) if x.rows is None else x.rows)
            .expand(len(experts))
            .contiguous()
        )
        positions = (x.topk_ids >= 0).cumsum(1).sub_(1).masked_fill_(x.topk_ids < 0, -1)
        return self._slots(
            x.hidden_states, [(e, at, at + 1) for at, e in enumerate(experts)], source
        ), positions

    def _slots(self, hidden_states: Tensor, spans: list[Span], source: Tensor) -> Tensor:
        if missing := self._missing.intersection(expert for expert, _, _ in spans):
            check_loaded(None, min(missing))
        packed = self._gate_up.product(hidden_states, spans, source)
        hidden = activate(packed, self.spec.activation, self.spec.row_invariant)
        return self._down.product(hidden, spans)
