"""Experts by zentorch's fused mixture-of-experts op, for processors with avx512_bf16.

Behaviour of zentorch 2.13.0.2 that was observed, and that this module relies on or guards against:

- The op packs each weight at first use. If it may choose its algorithm per call, it keeps two packings, twice
  the memory. Algorithm 3 (tiles of N) keeps one, in the caller's own buffer; with algorithm 1 a later change
  of the number of threads gave wrong results, with 3 it did not.
- The op remembers by address which buffers are packed. Memory that went back to the allocator and came again
  with other weights would be taken for packed and give wrong results without an error, and making the op
  forget every address would break the kernels that still live. So an :class:`Arena` never gives its addresses
  back.
- The op refuses an id of -1 and an empty input, and reads wrong elements if the innermost stride is not 1.
- A row's bits depend on the batch when its slots are summed, so ``exact`` mode does not use the op.
"""

import mmap
import weakref
from math import prod

import torch
from torch import Tensor
from torch.nn import functional

from xpar.kernels.activations import activate
from xpar.kernels.contracts import (
    ExpertInput,
    ExpertSpec,
    RouteSpec,
    Routing,
    check_expert_weights,
    require_loaded,
)
from xpar.kernels.cpu import zen_library
from xpar.kernels.rows import weighted_sum
from xpar.kernels.stable_topk import route_few_tokens

# Width of the tiles of the packed bfloat16 layout; other widths take a path that was not checked.
_TILE = 64
# Address ranges of dead arenas: the process never uses them again.
_retired: list[mmap.mmap] = []


def why_unavailable(spec: ExpertSpec) -> str | None:
    """Return why this kernel cannot serve ``spec`` here, or None; does not import zentorch."""
    if reason := zen_library.why_unavailable():
        return reason
    if spec.bias:
        return "biases were not checked with this kernel"
    if spec.hidden_size % _TILE or spec.intermediate_size % _TILE:
        return f"H={spec.hidden_size} and I={spec.intermediate_size} must both be multiples of {_TILE}"
    return None


class Arena:
    """A block of zeroed bytes; pages are freed with it, addresses are never used again."""

    def __init__(self, nbytes: int) -> None:
        self._memory = mmap.mmap(-1, max(nbytes, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            self._memory.madvise(mmap.MADV_HUGEPAGE)
        self._used = 0
        weakref.finalize(self, _retire, self._memory)

    def take(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Return the next piece of the arena as a tensor, which must not outlive the arena."""
        count = prod(shape)
        tensor = torch.frombuffer(self._memory, dtype=dtype, count=count, offset=self._used)
        self._used += count * dtype.itemsize
        return tensor.view(shape)


def _retire(memory: mmap.mmap) -> None:
    memory.madvise(mmap.MADV_DONTNEED)
    _retired.append(memory)


class ZenExperts:
    """An expert kernel in bfloat16 for x86 with avx512_bf16.

    Implements :class:`~xpar.kernels.contracts.FusedRoutingKernel`.

    The weights of all experts lie in one arena. They are packed there when the last expert is loaded; after
    that no expert can be loaded again.
    """

    name = "zentorch"

    def __init__(self, spec: ExpertSpec) -> None:
        self.spec = spec
        self._op = zen_library.load_operators().zentorch_fused_moe
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
        check_expert_weights(self.spec, index, gate_up, down, gate_up_bias, down_bias)
        if not self._missing:
            raise RuntimeError(
                f"expert {index}: the weights are packed already; build a new kernel to change them"
            )
        self._gate_up[index].copy_(gate_up)
        self._down[index].copy_(down)
        self._missing.discard(index)
        if not self._missing:
            self._pack_and_check()

    def compute(self, x: ExpertInput, out: Tensor | None = None) -> Tensor:
        if x.topk_ids.numel() and bool((x.topk_ids >= 0).all()):
            return self._call_op(_gather_inputs(x), x.topk_ids, x.topk_weights, out)
        slot_rows, positions = self._slots(x)
        return weighted_sum(slot_rows, x.topk_weights, positions, out)

    def compute_slots(self, x: ExpertInput) -> Tensor:
        return self._slots(x)[0]

    def route_and_compute(
        self, hidden_states: Tensor, router_logits: Tensor, route: RouteSpec
    ) -> tuple[Tensor, Routing]:
        routing = route_few_tokens(router_logits, route)
        return self._call_op(hidden_states, routing.topk_ids, routing.topk_weights, None), routing

    def nbytes(self) -> int:
        return self._gate_up.nbytes + self._down.nbytes

    def _slots(self, x: ExpertInput) -> tuple[Tensor, Tensor]:
        """Compute active slots as entries of one slot: [S, H], and their rows [M, k], -1 for none."""
        active = x.topk_ids >= 0
        entry = active.nonzero()[:, 0]
        positions = (active.reshape(-1).cumsum(0) - 1).view(active.shape).masked_fill(~active, -1)
        inputs = x.hidden_states.index_select(0, entry if x.rows is None else x.rows[entry])
        ids = x.topk_ids[active][:, None]
        return self._call_op(inputs, ids, torch.ones(ids.shape), None), positions

    def _call_op(self, inputs: Tensor, topk_ids: Tensor, topk_weights: Tensor, out: Tensor | None) -> Tensor:
        require_loaded(self._missing)
        result = out if out is not None and out.is_contiguous() else torch.empty_like(inputs)
        if inputs.shape[0]:
            ids, weights = topk_ids.to(torch.int32).contiguous(), topk_weights.float().contiguous()
            activation = self.spec.activation.name
            self._op(result, inputs, self._gate_up, self._down, None, None, weights, ids, False, activation)
        return result if out is None or result is out else out.copy_(result)

    def _pack_and_check(self) -> None:
        """Let the op pack, and check a row of the first and of the last expert against torch."""
        last = self.spec.num_experts - 1
        x = torch.linspace(-1, 1, self.spec.hidden_size).expand(2, -1).to(self.spec.dtype).contiguous()
        ids = torch.tensor([[0], [last]], dtype=torch.int32)
        expected = torch.cat([self._multiply_unpacked(x[:1], expert) for expert in (0, last)]).float()
        with zen_library.settings():
            got = self._call_op(x, ids, torch.ones(2, 1), None).float()
        if bool((got - expected).norm() > 0.05 * expected.norm()):
            raise RuntimeError(
                "zentorch disagrees with plain products on its first call; choose another kernel (onednn)"
            )

    def _multiply_unpacked(self, x: Tensor, expert: int) -> Tensor:
        gate_up_rows = functional.linear(x, self._gate_up[expert])
        return functional.linear(activate(gate_up_rows, self.spec.activation), self._down[expert])


def _gather_inputs(x: ExpertInput) -> Tensor:
    """Return the row that each entry reads: [M, H], contiguous."""
    if x.rows is not None:
        return x.hidden_states.index_select(0, x.rows)
    return x.hidden_states[: x.topk_ids.shape[0]].contiguous()
