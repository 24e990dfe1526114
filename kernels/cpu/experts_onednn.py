"""Experts as oneDNN products from weights packed once, at load: one gate-up and one down product per expert."""

import torch
from torch import Tensor

from xpar.kernels import rows
from xpar.kernels.activations import activate
from xpar.kernels.checks import check_expert, check_loaded
from xpar.kernels.contracts import ExpertInput, ExpertSpec, RouteSpec, Routing
from xpar.kernels.cpu.linear_onednn import Linear, make_linear, packing_refused
from xpar.kernels.cpu.processor import multiplies_bfloat16
from xpar.kernels.cpu.select import route_few_tokens
from xpar.kernels.cpu.sorted_slots import SortedSlots

# In float32 a product of very few rows may take another path through oneDNN, with other roundings.
_FP32_MIN_ROWS = 8


def unavailable(spec: ExpertSpec) -> str | None:
    """Why this kernel cannot serve ``spec`` here, or None."""
    if spec.row_invariant and spec.dtype == torch.bfloat16 and not multiplies_bfloat16():
        return "bfloat16 rows depend on their neighbours on a processor that cannot multiply bfloat16"
    if spec.row_invariant and spec.dtype == torch.float32 and (reason := packing_refused(spec.dtype)):
        return f"float32 rows depend on their neighbours unless weights are packed: {reason}"
    return None


class OneDnnExperts(SortedSlots):
    """See :class:`xpar.kernels.contracts.ExpertKernel`. Every dtype, any processor.

    Where oneDNN cannot pack the dtype (float16 without processor support) the products read row-major weights.
    Slot outputs pass through one workspace that grows to the largest batch seen, so one kernel serves one call at
    a time.
    """

    name = "onednn"

    def __init__(self, spec: ExpertSpec) -> None:
        self.spec = spec
        self._experts: list[tuple[Linear, Linear] | None] = [None] * spec.num_experts
        self._workspace = torch.empty(0, spec.hidden_size, dtype=spec.dtype)
        self._min_rows = _FP32_MIN_ROWS if spec.row_invariant and spec.dtype == torch.float32 else 1

    def load_expert(
        self,
        index: int,
        gate_up: Tensor,
        down: Tensor,
        gate_up_bias: Tensor | None = None,
        down_bias: Tensor | None = None,
    ) -> None:
        check_expert(self.spec, index, gate_up, down, gate_up_bias, down_bias)
        dtype = self.spec.dtype
        self._experts[index] = (
            make_linear(gate_up.to(dtype), gate_up_bias),
            make_linear(down.to(dtype), down_bias),
        )

    def route_and_compute(
        self, hidden_states: Tensor, router_logits: Tensor, route: RouteSpec
    ) -> tuple[Tensor, Routing]:
        routing = route_few_tokens(router_logits, route)
        if hidden_states.shape[0] != 1:
            return self.compute(ExpertInput(hidden_states, routing.topk_ids, routing.topk_weights)), routing
        slot_rows = self._slot_rows(route.top_k)
        for slot, expert in enumerate(routing.topk_ids[0].tolist()):
            slot_rows[slot : slot + 1] = self._expert(expert, hidden_states)
        positions = torch.arange(route.top_k)[None]
        return rows.weighted_sum(slot_rows, routing.topk_weights, positions), routing

    def nbytes(self) -> int:
        return sum(linear.nbytes() for pair in self._experts if pair for linear in pair)

    def _sorted_slots(self, x: ExpertInput) -> tuple[Tensor, Tensor]:
        if self._one_row_each(x):
            inputs = x.hidden_states if x.rows is None else x.hidden_states.index_select(0, x.rows)
            return self._expert(0, inputs[: x.topk_ids.shape[0]]), _identity(x.topk_ids)
        groups = rows.group_by_expert(x.topk_ids, self.spec.num_experts)
        source = groups.entry if x.rows is None else x.rows[groups.entry]
        slot_rows = self._slot_rows(groups.entry.numel())
        for expert, first, end in groups.spans():
            inputs = x.hidden_states.index_select(0, source[first:end])
            slot_rows[first:end] = self._expert(expert, inputs)
        return slot_rows, groups.positions

    def _slot_rows(self, count: int) -> Tensor:
        if self._workspace.shape[0] < count:
            self._workspace = self._workspace.new_empty(count, self.spec.hidden_size)
        return self._workspace[:count]

    def _one_row_each(self, x: ExpertInput) -> bool:
        """The form of shared experts: one expert that every entry goes to, so nothing needs sorting."""
        return self.spec.num_experts == 1 and x.topk_ids.shape[1] == 1 and bool((x.topk_ids == 0).all())

    def _expert(self, index: int, inputs: Tensor) -> Tensor:
        gate_up, down = check_loaded(self._experts[index], index)
        count = inputs.shape[0]
        if 0 < count < self._min_rows:
            inputs = torch.cat([inputs, inputs[:1].expand(self._min_rows - count, -1)])
        hidden = activate(gate_up(inputs), self.spec.activation, self.spec.row_invariant)
        return down(hidden)[:count]


def _identity(topk_ids: Tensor) -> Tensor:
    return torch.arange(topk_ids.shape[0], device=topk_ids.device)[:, None]
