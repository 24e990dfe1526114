"""Experts on a GPU: a sort of the slots, two products, and a weighted sum."""

from typing import Any

import torch
import triton
from torch import Tensor

from xpar.kernels.contracts import ExpertInput, ExpertSpec, check_expert_weights
from xpar.kernels.gpu.default_tables import default_table
from xpar.kernels.gpu.dependent_launch import launch_options
from xpar.kernels.gpu.expert_sort import TilePlan, plan_tiles
from xpar.kernels.gpu.few_tokens import reads_little_again
from xpar.kernels.gpu.grouped_mm_gathered import gate_up_gathered
from xpar.kernels.gpu.grouped_mm_small import down_small, gate_up_small
from xpar.kernels.gpu.grouped_mm_tiled import down_tiled, gate_up_tiled, permute_kernel
from xpar.kernels.gpu.grouped_mm_vector import down_vector, gate_up_vector
from xpar.kernels.gpu.limits import round_up
from xpar.kernels.gpu.slot_experts import SlotExperts, use_device_allocator
from xpar.kernels.gpu.tile_tables import (
    NO_LIMIT,
    SOME,
    Layout,
    Limits,
    Machine,
    Table,
    Tile,
    Tiles,
)

# Elements. Tensor descriptors need rows of a multiple of 16 bytes: widths are rounded up to this, with zeros.
_ALIGNED = 8
_ALL_CHOSEN = 4  # rows of an expert, on average; 2 % of the experts then have none
_PERMUTE_BLOCK = (16, 512)  # rows and columns of one program


class TritonExperts(SlotExperts):
    """An expert kernel in bfloat16, float16 and float32, for every activation and bias.

    Implements :class:`~xpar.kernels.contracts.ExpertKernel`.

    Intermediate rows come from torch's allocator, which gives the same memory to one layer after the other
    and its own to a CUDA graph: after one call of a shape (which compiles), ``compute`` can be captured.
    ``compute`` never waits for the device; ``compute_slots`` does once, because the number of its rows
    depends on the ids.

    If ``spec.row_invariant``, every row goes through tiles of one shape, whose sums over H and I have one
    order whatever the other rows are, and the slots of an entry are added in order.

    Args:
        spec: the requirements of the layer.
        table: launch parameters; the checked-in ones of the machine if None.
        machine: the GPU to choose launches for; that of ``spec.device`` if None.
    """

    name = "triton"

    def __init__(self, spec: ExpertSpec, table: Table | None = None, machine: Machine | None = None) -> None:
        self.spec = spec
        self.machine = machine or Machine.of(spec.device)
        self.table = table or default_table(self.machine, spec.dtype, spec.intermediate_size)
        e, h = spec.num_experts, spec.hidden_size
        self._width = round_up(spec.intermediate_size, _ALIGNED)
        rows = spec.activation.gate_up_rows(self._width)
        # load_expert leaves the columns beyond the true widths at zero.
        self._gate_up = torch.zeros(e, rows, round_up(h, _ALIGNED), dtype=spec.dtype, device=spec.device)
        self._down = self._gate_up.new_zeros(e, h, self._width)
        self._gate_up_bias = self._gate_up.new_zeros(e, rows) if spec.bias else None
        self._down_bias = self._gate_up.new_zeros(e, h) if spec.bias else None
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
        h, i = self.spec.hidden_size, self.spec.intermediate_size
        for half in range(2 if self.spec.activation.gated else 1):
            to, source = slice(half * self._width, half * self._width + i), slice(half * i, half * i + i)
            self._gate_up[index, to, :h].copy_(gate_up[source])
            if self._gate_up_bias is not None and gate_up_bias is not None:
                self._gate_up_bias[index, to].copy_(gate_up_bias[source])
        self._down[index, :, :i].copy_(down)
        if self._down_bias is not None and down_bias is not None:
            self._down_bias[index].copy_(down_bias)
        self._missing.discard(index)

    def nbytes(self) -> int:
        tensors = (self._gate_up, self._down, self._gate_up_bias, self._down_bias)
        return sum(t.nbytes for t in tensors if t is not None)

    def is_tiny(self, x: ExpertInput) -> bool:
        """Return whether reading experts once for each slot costs less than sorting the slots."""
        tokens, top_k = x.topk_ids.shape
        if self.spec.row_invariant or not 0 < tokens <= self.table.vector_tokens:
            return False
        if self.table.vector_bytes is None:
            return tokens == 1 or 2 * tokens * top_k <= self.spec.num_experts
        expert_bytes = self._gate_up[0].nbytes + self._down[0].nbytes
        return reads_little_again(self.spec, tokens, top_k, expert_bytes, self.table.vector_bytes)

    def _compute_tiny(self, x: ExpertInput, out: Tensor | None) -> Tensor:
        """Return the weighted sums [M, H] by two launches, for very few tokens."""
        tokens, top_k = x.topk_ids.shape
        h, first, second = self.spec.hidden_size, self.table.gate_up_vector, self.table.down_vector
        early = launch_options(self.table.dependent and tokens > 1)
        ids, router_weights = x.topk_ids.contiguous(), x.topk_weights.float().contiguous()
        hidden = self._new(tokens * top_k, self._width)
        total = self._new(tokens, h) if out is None else out
        gate_up_vector[(triton.cdiv(self._width, first.columns), tokens * top_k)](
            x.hidden_states, self._gate_up, self._gate_up_bias, hidden, x.rows, ids,
            I=self._width, H=h, K=self._gate_up.shape[2], TOP_K=top_k, **self._activation(),
            BN=first.columns, BK=first.depth, STAGES=first.stages, num_warps=first.warps, **early,
        )  # fmt: skip
        down_vector[(triton.cdiv(h, second.columns), tokens)](
            hidden, self._down, self._down_bias, total, ids, router_weights,
            I=self._width, H=h, TOP_K=top_k,
            BN=second.columns, BK=second.depth, STAGES=second.stages, num_warps=second.warps, **early,
        )  # fmt: skip
        return total

    def _compute_all_slots(self, x: ExpertInput) -> Tensor:
        """Return each active slot's output [M k, H], unweighted; inactive rows are not written."""
        tokens, top_k = x.topk_ids.shape
        num_slots = tokens * top_k
        out = self._new(num_slots, self.spec.hidden_size)
        if not num_slots:
            return out
        use_device_allocator()
        ids, layout = x.topk_ids.contiguous(), self.layout(tokens, num_slots)
        plan = plan_tiles(
            ids, self.spec.num_experts, layout.plan_tiles, layout.limits, layout.tall,
            ranked_slots=self.table.ranked_slots, dependent=self.has_dependent_launches,
        )  # fmt: skip
        hidden = self._new(num_slots, self._width)
        for bucket, tiles in layout.lists:
            if tiles.swapped or tiles.gathered:
                self._gate_up_gathering(x, hidden, plan, bucket, tiles)
            else:
                self._gate_up_tiled(self._permute(x, ids, plan, layout.limits), hidden, plan, bucket, tiles)
        for bucket, tiles in layout.lists:
            self._down_product(x, hidden, out, plan, bucket, tiles)
        return out

    def layout(self, tokens: int, num_slots: int) -> Layout:
        """Return the lists of tiles for a batch of ``tokens`` entries and ``num_slots`` slots."""
        if self.spec.row_invariant:  # one shape, whatever the batch
            return Layout(Limits(0, NO_LIMIT), ((SOME, self.table.tiles(SOME)),))
        return self.table.layout(
            tokens, num_slots, self.spec.num_experts, self._expected_slots(tokens, num_slots)
        )

    def _expected_slots(self, tokens: int, num_slots: int) -> float:
        """Return how many slots of a batch are of experts here, as far as its shape tells."""
        experts = self.spec.num_experts
        here = min(1.0, experts / (self.spec.routed_experts or experts))
        return max(here * num_slots, tokens)  # rows that were sent to this rank alone have a slot here each

    def _prefetched(self, x: ExpertInput, weight: Tensor) -> int:
        """Return the bytes of each row of ``weight`` that swapped products fetch while they wait."""
        if not self.table.dependent or self.spec.row_invariant:
            return 0
        if (
            self._expected_slots(x.topk_ids.shape[0], x.topk_ids.numel())
            < _ALL_CHOSEN * self.spec.num_experts
        ):
            return 0  # a program's first tile is then of an expert that nobody can foresee
        return min(self.table.prefetch, weight.shape[2] * weight.itemsize // 16 * 16)

    def _permute(self, x: ExpertInput, ids: Tensor, plan: TilePlan, limits: Limits) -> Tensor:
        """Return the hidden states of experts in MANY, in expert order: [M k, K], K the aligned H."""
        k = self._gate_up.shape[2]
        ordered = self._new(ids.numel(), k)
        rows, columns = _PERMUTE_BLOCK
        permute_kernel[(triton.cdiv(ids.numel(), rows), triton.cdiv(k, columns))](
            x.hidden_states, x.rows, ids, plan.slots, plan.offsets, ordered, ids.numel(), limits.few,
            limits.some, E=self.spec.num_experts, H=self.spec.hidden_size, K=k, TOP_K=ids.shape[1], BM=rows,
            BK=columns, num_warps=4, **self._dependent,
        )  # fmt: skip
        return ordered

    def _gate_up_tiled(
        self, ordered: Tensor, hidden: Tensor, plan: TilePlan, bucket: int, tiles: Tiles
    ) -> None:
        """Write the activated rows of a list to ``hidden`` [M k, I], from rows in expert order."""
        gate_up_tiled[self._persistent_grid(tiles.gate_up)](
            ordered, self._gate_up, self._gate_up_bias, hidden,
            plan.offsets, plan.tile_expert, plan.tile_row, plan.tile_count, hidden.shape[0], plan.capacity,
            E=self.spec.num_experts, I=self._width, K=self._gate_up.shape[2], **self._activation(),
            **self._launch(tiles.gate_up, bucket), TALL=tiles.tall,
        )  # fmt: skip

    def _gate_up_gathering(
        self, x: ExpertInput, hidden: Tensor, plan: TilePlan, bucket: int, tiles: Tiles
    ) -> None:
        """Write the activated rows of a list to ``hidden`` [M k, I]; the product gathers its rows."""
        lists = (plan.slots, plan.offsets, plan.tile_expert, plan.tile_row, plan.tile_count)
        operands = (x.hidden_states, self._gate_up, self._gate_up_bias, hidden, x.rows)
        constants = {
            "E": self.spec.num_experts, "I": self._width, "H": self.spec.hidden_size,
            "K": self._gate_up.shape[2], "TOP_K": x.topk_ids.shape[1], **self._activation(),
            **self._launch(tiles.gate_up, bucket),
        }  # fmt: skip
        grid = self._persistent_grid(tiles.gate_up)
        if tiles.swapped:
            prefetch = self._prefetched(x, self._gate_up)
            gate_up_small[grid](*operands, *lists, plan.capacity, **constants, PREFETCH=prefetch)
        else:
            gate_up_gathered[grid](*operands, *lists, plan.capacity, **constants)

    def _down_product(
        self, x: ExpertInput, hidden: Tensor, out: Tensor, plan: TilePlan, bucket: int, tiles: Tiles
    ) -> None:
        """Write the outputs of a list's slots to ``out`` [M k, H]."""
        lists = (plan.slots, plan.offsets, plan.tile_expert, plan.tile_row, plan.tile_count)
        shape = {"E": self.spec.num_experts, "I": self._width, "H": self.spec.hidden_size}
        weights, launch = (self._down, self._down_bias), self._launch(tiles.down, bucket)
        grid = self._persistent_grid(tiles.down)
        if tiles.swapped:
            prefetch = self._prefetched(x, self._down)
            down_small[grid](
                hidden, *weights, out, *lists, plan.capacity, **shape, **launch, PREFETCH=prefetch
            )
        else:
            down_tiled[grid](
                hidden, *weights, out, *lists, hidden.shape[0], plan.capacity, **shape, **launch,
                TALL=tiles.tall,
            )  # fmt: skip

    @property
    def has_dependent_launches(self) -> bool:
        return self.table.dependent

    @property
    def _dependent(self) -> dict[str, bool]:
        return launch_options(self.has_dependent_launches)

    def _persistent_grid(self, tile: Tile) -> tuple[int]:
        return (self.machine.sms * tile.per_sm,)

    def _launch(self, tile: Tile, bucket: int) -> dict[str, Any]:
        return {
            "BUCKET": bucket, "BM": tile.rows, "BN": tile.columns, "BK": tile.depth, "GROUP": tile.group,
            "PROGRAMS": self.machine.sms * tile.per_sm, "FLATTEN": tile.flatten,
            "num_warps": tile.warps, "num_stages": tile.stages, **self._dependent,
        }  # fmt: skip
