"""Experts by oneDNN, two products per expert, from weights packed once, at load."""

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
from xpar.kernels.cpu.host import multiplies_bfloat16
from xpar.kernels.cpu.linear_onednn import Linear, pack_linear, why_not_packed
from xpar.kernels.cpu.sorted_slots import SortedSlots
from xpar.kernels.rows import group_by_expert, weighted_sum
from xpar.kernels.stable_topk import route_few_tokens

# In float32 a product of fewer rows may take another path through oneDNN, which rounds differently.
_FP32_MIN_ROWS = 8


def why_unavailable(spec: ExpertSpec) -> str | None:
    """Return the reason why this kernel cannot serve ``spec`` on this machine, or None."""
    if spec.row_invariant and spec.dtype == torch.bfloat16 and not multiplies_bfloat16():
        return "bfloat16 rows depend on their neighbours on a processor that cannot multiply bfloat16"
    if spec.row_invariant and spec.dtype == torch.float32 and (reason := why_not_packed(spec.dtype)):
        return f"float32 rows depend on their neighbours unless weights are packed: {reason}"
    return None


class OneDnnExperts(SortedSlots):
    """An expert kernel for every dtype on every processor.

    Implements :class:`~xpar.kernels.contracts.FusedRoutingKernel`.

    If oneDNN cannot pack the dtype (float16 without processor support), the products read row-major weights.
    Slot outputs pass through one workspace that grows to the largest batch seen, so a kernel serves one call
    at a time.
    """

    name = "onednn"

    def __init__(self, spec: ExpertSpec) -> None:
        self.spec = spec
        self._experts: dict[int, tuple[Linear, Linear]] = {}
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
        check_expert_weights(self.spec, index, gate_up, down, gate_up_bias, down_bias)
        dtype = self.spec.dtype
        self._experts[index] = (
            pack_linear(gate_up.to(dtype), gate_up_bias),
            pack_linear(down.to(dtype), down_bias),
        )

    def route_and_compute(
        self, hidden_states: Tensor, router_logits: Tensor, route: RouteSpec
    ) -> tuple[Tensor, Routing]:
        routing = route_few_tokens(router_logits, route)
        if hidden_states.shape[0] != 1:
            return self.compute(ExpertInput(hidden_states, routing.topk_ids, routing.topk_weights)), routing
        slot_rows = self._take_workspace(route.top_k)
        for slot, expert in enumerate(routing.topk_ids[0].tolist()):
            slot_rows[slot : slot + 1] = self._compute_expert(expert, hidden_states)
        positions = torch.arange(route.top_k)[None]
        return weighted_sum(slot_rows, routing.topk_weights, positions), routing

    def nbytes(self) -> int:
        return sum(linear.nbytes() for pair in self._experts.values() for linear in pair)

    def _sorted_slots(self, x: ExpertInput) -> tuple[Tensor, Tensor]:
        if self._is_single_expert(x):
            inputs = x.hidden_states if x.rows is None else x.hidden_states.index_select(0, x.rows)
            positions = torch.arange(x.topk_ids.shape[0], device=x.topk_ids.device)[:, None]
            return self._compute_expert(0, inputs[: x.topk_ids.shape[0]]), positions
        groups = group_by_expert(x.topk_ids, self.spec.num_experts)
        source = groups.entry if x.rows is None else x.rows[groups.entry]
        slot_rows = self._take_workspace(groups.entry.numel())
        for expert, first, end in groups.spans():
            inputs = x.hidden_states.index_select(0, source[first:end])
            slot_rows[first:end] = self._compute_expert(expert, inputs)
        return slot_rows, groups.positions

    def _take_workspace(self, count: int) -> Tensor:
        """Return ``count`` rows of the workspace, which grows if it is smaller."""
        if self._workspace.shape[0] < count:
            self._workspace = self._workspace.new_empty(count, self.spec.hidden_size)
        return self._workspace[:count]

    def _is_single_expert(self, x: ExpertInput) -> bool:
        """Return whether all entries go to the only expert, as shared ones do: no sort is needed."""
        return self.spec.num_experts == 1 and x.topk_ids.shape[1] == 1 and bool((x.topk_ids == 0).all())

    def _compute_expert(self, index: int, inputs: Tensor) -> Tensor:
        if index not in self._experts:
            require_loaded((index,))
        gate_up, down = self._experts[index]
        count = inputs.shape[0]
        if 0 < count < self._min_rows:
            inputs = torch.cat([inputs, inputs[:1].expand(self._min_rows - count, -1)])
        hidden = activate(gate_up(inputs), self.spec.activation, self.spec.row_invariant)
        return down(hidden)[:count]
