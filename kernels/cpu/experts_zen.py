"""Experts through zentorch's fused mixture-of-experts op, for processors with avx512_bf16.

What was seen of zentorch 2.13.0.2, and is relied on or guarded against here:

- The op packs each weight at first use. Left to choose its algorithm per call it keeps two packings, twice the
  memory. Algorithm 3 (tiles of N) keeps one, in the caller's own buffer; with algorithm 1 a later change of the
  number of threads gave wrong results, with 3 it did not.
- It remembers packed buffers by address: see :mod:`xpar.kernels.cpu.arena`.
- It refuses an id of -1 and an empty input, and reads wrong elements when the innermost stride is not 1.
- A row's bits depend on the batch when its slots are summed, so ``exact`` mode does not use it.
"""

import torch
from torch import Tensor
from torch.nn import functional

from xpar.kernels import rows
from xpar.kernels.activations import activate
from xpar.kernels.checks import check_expert, check_loaded
from xpar.kernels.contracts import ExpertInput, ExpertSpec, RouteSpec, Routing
from xpar.kernels.cpu import zen_library
from xpar.kernels.cpu.arena import Arena
from xpar.kernels.cpu.select import route_few_tokens

# Tiles that its packed bfloat16 layout is made of; other widths take a path that was not checked.
_TILE = 64


def unavailable(spec: ExpertSpec) -> str | None:
    """Why this kernel cannot serve ``spec`` here, or None. Does not import zentorch."""
    if reason := zen_library.refused():
        return reason
    if spec.bias:
        return "biases were not checked with this kernel"
    if spec.hidden_size % _TILE or spec.intermediate_size % _TILE:
        return f"H={spec.hidden_size} and I={spec.intermediate_size} must both be multiples of {_TILE}"
    return None


class ZenExperts:
    """See :class:`xpar.kernels.contracts.ExpertKernel`. bfloat16 on x86 with avx512_bf16.

    Weights lie stacked in one arena and are packed there once the last expert is loaded, after which no expert
    can be loaded again.
    """

    name = "zentorch"

    def __init__(self, spec: ExpertSpec) -> None:
        self.spec = spec
        self._op = zen_library.load().zentorch_fused_moe
        e, h, i = spec.num_experts, spec.hidden_size, spec.intermediate_size
        self._arena = Arena(3 * e * h * i * spec.dtype.itemsize)
        self._gate_up = self._arena.take((e, 2 * i, h), spec.dtype)
        self._down = self._arena.take((e, h, i), spec.dtype)
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
        if not self._missing:
            raise RuntimeError(
                f"expert {index}: the weights are packed already; build a new kernel to change them"
            )
        self._gate_up[index].copy_(gate_up)
        self._down[index].copy_(down)
        self._missing.discard(index)
        if not self._missing:
            self._pack()

    def compute(self, x: ExpertInput, out: Tensor | None = None) -> Tensor:
        if x.topk_ids.numel() and bool((x.topk_ids >= 0).all()):
            return self._run(_read(x), x.topk_ids, x.topk_weights, out)
        slot_rows, positions = self._slots(x)
        return rows.weighted_sum(slot_rows, x.topk_weights, positions, out)

    def compute_slots(self, x: ExpertInput) -> Tensor:
        return self._slots(x)[0]

    def route_and_compute(
        self, hidden_states: Tensor, router_logits: Tensor, route: RouteSpec
    ) -> tuple[Tensor, Routing]:
        routing = route_few_tokens(router_logits, route)
        return self._run(hidden_states, routing.topk_ids, routing.topk_weights, None), routing

    def nbytes(self) -> int:
        return self._gate_up.nbytes + self._down.nbytes

    def _slots(self, x: ExpertInput) -> tuple[Tensor, Tensor]:
        """Active slots as entries of one slot each, in (entry, slot) order, and their places in [M, k]."""
        active = x.topk_ids >= 0
        entry = active.nonzero()[:, 0]
        positions = (active.reshape(-1).cumsum(0) - 1).view(active.shape).masked_fill(~active, -1)
        inputs = x.hidden_states.index_select(0, entry if x.rows is None else x.rows[entry])
        ids = x.topk_ids[active][:, None]
        return self._run(inputs, ids, torch.ones(ids.shape), None), positions

    def _run(self, inputs: Tensor, topk_ids: Tensor, topk_weights: Tensor, out: Tensor | None) -> Tensor:
        check_loaded(None if self._missing else True, min(self._missing, default=0))
        result = out if out is not None and out.is_contiguous() else torch.empty_like(inputs)
        if inputs.shape[0]:
            ids, weights = topk_ids.to(torch.int32).contiguous(), topk_weights.float().contiguous()
            act = self.spec.activation.name
            self._op(result, inputs, self._gate_up, self._down, None, None, weights, ids, False, act)
        return result if out is None or result is out else out.copy_(result)

    def _pack(self) -> None:
        """Let the op pack, and compare one row of the first and of the last expert with plain products."""
        last = self.spec.num_experts - 1
        x = torch.linspace(-1, 1, self.spec.hidden_size).expand(2, -1).to(self.spec.dtype).contiguous()
        ids = torch.tensor([[0], [last]], dtype=torch.int32)
        expected = torch.cat([self._plain(x[:1], expert) for expert in (0, last)]).float()
        with zen_library.settings():
            got = self._run(x, ids, torch.ones(2, 1), None).float()
        if bool((got - expected).norm() > 0.05 * expected.norm()):
            raise RuntimeError(
                "zentorch disagrees with plain products on its first call; choose another kernel (onednn)"
            )

    def _plain(self, x: Tensor, expert: int) -> Tensor:
        packed = functional.linear(x, self._gate_up[expert])
        return functional.linear(activate(packed, self.spec.activation), self._down[expert])


def _read(x: ExpertInput) -> Tensor:
    if x.rows is not None:
        return x.hidden_states.index_select(0, x.rows)
    return x.hidden_states[: x.topk_ids.shape[0]].contiguous()
