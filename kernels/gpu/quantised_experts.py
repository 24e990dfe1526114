"""Experts on a GPU that keep e4m3 codes and compute from them: quantise, sort, two products, weighted sum."""

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
from torch import Tensor

from xpar.kernels.contracts import ExpertInput, ExpertSpec, check_expert_weights
from xpar.kernels.gpu.code_tables import (
    CodeTable,
    Height,
    default_code_table,
    has_dot8,
    most_registers,
    why_not_format,
)
from xpar.kernels.gpu.coded_rows import decode_rows, split_words
from xpar.kernels.gpu.expert_sort import TilePlan, plan_tiles
from xpar.kernels.gpu.few_tokens import reads_little_again
from xpar.kernels.gpu.grouped_mm_codes_decoded import down_codes_decoded, gate_up_codes_decoded
from xpar.kernels.gpu.grouped_mm_codes_small import down_codes_small, gate_up_codes_small
from xpar.kernels.gpu.grouped_mm_codes_tiled import down_codes_tiled, gate_up_codes_tiled
from xpar.kernels.gpu.grouped_mm_codes_vector import down_codes_vector, gate_up_codes_vector
from xpar.kernels.gpu.limits import round_up
from xpar.kernels.gpu.quantise_rows import permute_codes, quantise_rows
from xpar.kernels.gpu.slot_experts import CodeExperts, use_device_allocator
from xpar.kernels.gpu.tile_tables import NO_LIMIT, Limits, Machine, Tile, Vector
from xpar.kernels.quantised_weight import QuantisedWeight, WeightFormat

_BLOCK = 128  # inputs of a scale of activations; widths are rounded up to this, with zeros


class QuantisedExperts(CodeExperts):
    """An expert kernel that computes from e4m3 codes in blocks of 128 inputs, or with a scale a row.

    Implements :class:`~xpar.kernels.contracts.QuantisedKernel`. Where the layer has an activation scheme, and
    rows need not be invariant, both products multiply codes of the activations. Otherwise, and for very few
    tokens, activations are as exact as in bfloat16. Memory and graphs: as
    :class:`~xpar.kernels.gpu.experts.TritonExperts`.

    Args:
        spec: the requirements of the layer, with a weight format.
        table: launch parameters; the checked-in ones of the machine if None.
        machine: the GPU to choose launches for; that of ``spec.device`` if None.
        has_asm: True for inline PTX, False for the same in Triton, which its interpreter can run.
    """

    name = "triton"

    def __init__(
        self,
        spec: ExpertSpec,
        table: CodeTable | None = None,
        machine: Machine | None = None,
        has_asm: bool = True,
    ) -> None:
        if spec.weight_format is None or why_not_format(spec.weight_format):
            raise ValueError(f"{spec.weight_format}: not a format of this kernel")
        self.spec = spec
        self.machine = machine or Machine.of(spec.device)
        self._has_asm = has_asm
        self.scheme = None if spec.row_invariant else spec.activation_scheme
        self.table = table or default_code_table(self.machine, self.terms)
        if self.scheme is not None or spec.dtype != torch.bfloat16:
            self.table = self.table.without_decoded()
        e, h, i = spec.num_experts, spec.hidden_size, spec.intermediate_size
        self._width, self._depth = round_up(i, _BLOCK), round_up(h, _BLOCK)
        halves = 2 if spec.activation.gated else 1
        self._gate_up_blocks = _Blocks.of(spec.weight_format, i if halves == 2 else 0, self._depth)
        self._down_blocks = _Blocks.of(spec.weight_format, 0, self._width)
        # e4m3 as bytes: load_quantised leaves the codes beyond the true widths at zero.
        self._gate_up = torch.zeros(
            e, halves * self._width, self._depth, dtype=torch.uint8, device=spec.device
        )
        self._down = self._gate_up.new_zeros(e, h, self._width)
        self._gate_up_scales = self._new_scales(halves, self._width, self._gate_up_blocks)
        self._down_scales = self._new_scales(1, h, self._down_blocks)
        self._gate_up_bias = self._new(e, halves * self._width).zero_() if spec.bias else None
        self._down_bias = self._new(e, h).zero_() if spec.bias else None
        self._missing = set(range(e))

    @property
    def terms(self) -> int:
        """Codes of an activation: one where the layer quantises activations, else two."""
        return 1 if self.scheme else 2

    def load_quantised(
        self,
        index: int,
        gate_up: QuantisedWeight,
        down: QuantisedWeight,
        gate_up_bias: Tensor | None = None,
        down_bias: Tensor | None = None,
    ) -> None:
        """See :class:`xpar.kernels.contracts.QuantisedKernel`."""
        check_expert_weights(self.spec, index, gate_up, down, gate_up_bias, down_bias)
        h, i = self.spec.hidden_size, self.spec.intermediate_size
        for half in range(2 if self.spec.activation.gated else 1):
            to, source = slice(half * self._width, half * self._width + i), slice(half * i, half * i + i)
            self._gate_up[index, to, :h].copy_(gate_up.codes[source].view(torch.uint8))
            self._gate_up_blocks.copy(gate_up, half * i, i, self._gate_up_scales[index, half])
        self._down[index, :, :i].copy_(down.codes.view(torch.uint8))
        self._down_blocks.copy(down, 0, h, self._down_scales[index, 0])
        self._load_biases(index, gate_up_bias, down_bias)
        self._missing.discard(index)

    def nbytes(self) -> int:
        scales = (self._gate_up_scales, self._down_scales)
        tensors = (self._gate_up, self._down, *scales, self._gate_up_bias, self._down_bias)
        return sum(t.nbytes for t in tensors if t is not None)

    def is_tiny(self, x: ExpertInput) -> bool:
        """Return whether reading experts once for each slot costs less than sorting the slots."""
        tokens, top_k = x.topk_ids.shape
        if self.spec.row_invariant or not 0 < tokens <= self.table.vector_tokens:
            return False
        expert_bytes = self._gate_up[0].nbytes + self._down[0].nbytes
        return reads_little_again(self.spec, tokens, top_k, expert_bytes, self.table.vector_bytes)

    def _compute_tiny(self, x: ExpertInput, out: Tensor | None) -> Tensor:
        x = self._decode_rows(x)
        tokens, top_k = x.topk_ids.shape
        h = self.spec.hidden_size
        first = _fit_depth(self.table.gate_up_vector, self._depth)
        second = _fit_depth(self.table.down_vector, self._width)
        ids, router_weights = x.topk_ids.contiguous(), x.topk_weights.float().contiguous()
        hidden = self._new(tokens * top_k, self._width)
        total = self._new(tokens, h) if out is None else out
        gate_up_codes_vector[(triton.cdiv(self._width, first.columns), tokens * top_k)](
            x.hidden_states, self._gate_up, self._gate_up_scales, self._gate_up_bias, hidden,
            x.rows, ids, I=self._width, H=h, K=self._depth, TOP_K=top_k, **self._activation(),
            **self._gate_up_blocks.constants, **self._vector_launch(first),
        )  # fmt: skip
        down_codes_vector[(triton.cdiv(h, second.columns), tokens)](
            hidden, self._down, self._down_scales, self._down_bias, total, ids, router_weights,
            I=self._width, H=h, TOP_K=top_k, **self._down_blocks.constants, **self._vector_launch(second),
        )  # fmt: skip
        return total

    def _compute_all_slots(self, x: ExpertInput) -> Tensor:
        tokens, top_k = x.topk_ids.shape
        out = self._new(tokens * top_k, self.spec.hidden_size)
        if not tokens * top_k:
            return out
        use_device_allocator()
        height = self.height(tokens * top_k)
        one_list = Limits(NO_LIMIT, NO_LIMIT)
        plan = plan_tiles(x.topk_ids.contiguous(), self.spec.num_experts, (height.gate_up,) * 3, one_list)
        if height.decoded:
            self._multiply_decoded(height, self._decode_rows(x), plan, out)
            return out
        if x.row_format is None:
            codes, scales = self._quantise(x.hidden_states, x.rows, self._depth)
        else:
            codes, scales = split_words(
                x.hidden_states, x.rows, x.row_format, self._depth, has_dot8=has_dot8(self.machine)
            )
        hidden, hidden_scales = self._gate_up_product(height, codes, scales, plan, top_k)
        self._down_product(height, hidden, hidden_scales, plan, out)
        return out

    def _decode_rows(self, x: ExpertInput) -> ExpertInput:
        """Return ``x`` with rows of numbers, not of codes."""
        if x.row_format is None:
            return x
        decoded = decode_rows(
            x.hidden_states, x.rows, x.row_format, self.spec.dtype, has_dot8=has_dot8(self.machine)
        )
        return replace(x, hidden_states=decoded, rows=None, row_format=None)

    def _multiply_decoded(self, height: Height, x: ExpertInput, plan: TilePlan, out: Tensor) -> None:
        """Write the outputs of all active slots to ``out`` [M k, H], by weights that become bfloat16."""
        h, hidden = self.spec.hidden_size, self._new(out.shape[0], self._width)
        lists = (plan.slots, plan.offsets, plan.tile_expert, plan.tile_row, plan.tile_count, plan.capacity)
        first, second = height.gate_up, height.down
        gate_up_codes_decoded[self._persistent_grid(first)](
            x.hidden_states, self._gate_up.view(torch.int16), self._gate_up_scales, self._gate_up_bias,
            hidden, x.rows, *lists, I=self._width, H=h, K=self._depth, TOP_K=x.topk_ids.shape[1],
            **self._activation(), **self._gate_up_blocks.constants, **self._decoded_launch(first),
        )  # fmt: skip
        down_codes_decoded[self._persistent_grid(second)](
            hidden, self._down.view(torch.int16), self._down_scales, self._down_bias, out, *lists,
            I=self._width, H=h, **self._down_blocks.constants, **self._decoded_launch(second),
        )  # fmt: skip

    def _decoded_launch(self, tile: Tile) -> dict[str, Any]:
        return {
            "ASM": self._has_asm, "BM": tile.rows, "BN": tile.columns, "GROUP": tile.group,
            "PROGRAMS": self.machine.sms * tile.per_sm, "STAGES": tile.stages, "num_warps": tile.warps,
            "num_stages": tile.stages, "maxnreg": most_registers(tile),
        }  # fmt: skip

    def height(self, slots: int) -> Height:
        """Return the tiles for a batch of ``slots`` slots."""
        if self.spec.row_invariant:
            return self.table.heights[self.table.exact]
        return self.table.height(slots, self.spec.num_experts)

    def _quantise(self, x: Tensor, rows: Tensor | None, columns: int) -> tuple[Tensor, Tensor]:
        """Return codes [terms, N, columns] and scales of rows; without a scheme, all bits of bfloat16."""
        scheme = self.scheme
        return quantise_rows(
            x, rows, group=scheme.group if scheme else _BLOCK,
            power_of_two=scheme.power_of_two if scheme else True,
            columns=columns, terms=self.terms, has_dot8=has_dot8(self.machine),
        )  # fmt: skip

    def _gate_up_product(
        self, height: Height, codes: Tensor, scales: Tensor, plan: TilePlan, top_k: int
    ) -> tuple[Tensor, Tensor]:
        """Return the activated rows in sorted order as codes and scales."""
        tokens, num_rows = codes.shape[1], plan.slots.shape[0]
        to_codes = self.scheme is None or self.scheme.group == _BLOCK
        if to_codes:
            hidden = codes.new_empty(self.terms, num_rows, self._width)
            hidden_scales = scales.new_empty(self._width // _BLOCK, num_rows)
        else:
            hidden, hidden_scales = self._new(num_rows, self._width), scales
        weights = (self._codes(self._gate_up), self._gate_up_scales, self._gate_up_bias)
        lists = (plan.offsets, plan.tile_expert, plan.tile_row, plan.tile_count)
        constants = {
            "E": self.spec.num_experts, "I": self._width, "K": self._depth, **self._activation(),
            "TO_CODES": to_codes, "POWER_OF_TWO": self.scheme is None or self.scheme.power_of_two,
            **self._gate_up_blocks.constants, **self._launch(height.gate_up, scales),
        }  # fmt: skip
        grid = self._persistent_grid(height.gate_up)
        if height.swapped:
            gate_up_codes_small[grid](
                codes, scales, *weights, hidden, hidden_scales, plan.slots, *lists, tokens, num_rows,
                plan.capacity, TOP_K=top_k, **constants,
            )  # fmt: skip
        else:
            count = plan.offsets[self.spec.num_experts :]
            codes, scales = permute_codes(codes, scales, plan.slots, count, top_k)
            gate_up_codes_tiled[grid](
                codes, scales, *weights, hidden, hidden_scales, *lists, num_rows, plan.capacity, **constants
            )
        return (hidden, hidden_scales) if to_codes else self._quantise(hidden, None, self._width)

    def _down_product(
        self, height: Height, hidden: Tensor, scales: Tensor, plan: TilePlan, out: Tensor
    ) -> None:
        """Write the outputs of all active slots to ``out`` [M k, H]."""
        lists = (plan.slots, plan.offsets, plan.tile_expert, plan.tile_row, plan.tile_count)
        product = down_codes_small if height.swapped else down_codes_tiled
        product[self._persistent_grid(height.down)](
            hidden, scales, self._codes(self._down), self._down_scales, self._down_bias, out, *lists,
            out.shape[0], plan.capacity, E=self.spec.num_experts, I=self._width, H=self.spec.hidden_size,
            **self._down_blocks.constants, **self._launch(height.down, scales),
        )  # fmt: skip

    def _codes(self, weight: Tensor) -> Tensor:
        """Return codes in the dtype in which the kernels take them on this machine."""
        return weight.view(torch.float8_e4m3fn) if has_dot8(self.machine) else weight

    def _persistent_grid(self, tile: Tile) -> tuple[int]:
        return (self.machine.sms * tile.per_sm,)

    def _launch(self, tile: Tile, row_scales: Tensor) -> dict[str, Any]:
        return {
            "TERMS": self.terms, "ROW_BLOCKS": row_scales.shape[0], "DOT8": has_dot8(self.machine),
            "BM": tile.rows, "BN": tile.columns, "GROUP": tile.group,
            "PROGRAMS": self.machine.sms * tile.per_sm, "num_warps": tile.warps, "num_stages": tile.stages,
        }  # fmt: skip

    def _vector_launch(self, vector: Vector) -> dict[str, Any]:
        return {
            "ASM": self._has_asm, "BN": vector.columns, "BG": vector.depth // _BLOCK,
            "STAGES": vector.stages, "num_warps": vector.warps,
        }  # fmt: skip

    def _new_scales(self, halves: int, rows: int, blocks: "_Blocks") -> Tensor:
        shape = (self.spec.num_experts, halves, -(-rows // blocks.rows), blocks.columns)
        return torch.zeros(shape, dtype=torch.float32, device=self.spec.device)


@dataclass(frozen=True)
class _Blocks:
    """The blocks of a matrix in the kernel's layout: ``rows`` share scales, a row has ``columns`` of them."""

    rows: int
    columns: int

    @staticmethod
    def of(fmt: WeightFormat, start: int, depth: int) -> "_Blocks":
        """Return the blocks of a matrix with ``depth`` inputs whose second half begins at row ``start``.

        That may be inside a block of the format: the most rows that never lie across two blocks count.
        """
        columns = depth // _BLOCK if fmt.block[1] else 1
        return _Blocks(math.gcd(fmt.block[0], start, _BLOCK) if fmt.block[0] else 1, columns)

    @property
    def constants(self) -> dict[str, int]:
        return {"BLOCKS": self.columns, "BLOCK_ROWS": self.rows}

    def copy(self, weight: QuantisedWeight, first: int, count: int, to: Tensor) -> None:
        """Copy the scales of rows ``first`` to ``first + count`` into ``to`` [blocks of rows, columns]."""
        scales = weight.scales.float()
        if weight.global_scale is not None:
            scales = scales * weight.global_scale
        block_rows, block_cols = weight.format.block
        row = torch.arange(first, first + count, self.rows, device=scales.device) // (block_rows or 1)
        column = torch.arange(0, weight.cols, _BLOCK, device=scales.device) // (block_cols or 1)
        row = row if block_rows else torch.zeros_like(row)
        column = column if block_cols else column.new_zeros(1)
        to[: row.numel(), : column.numel()].copy_(scales[row[:, None], column])


def _fit_depth(vector: Vector, width: int) -> Vector:
    """Return ``vector`` with as many inputs at a time as leave few lanes without work."""
    blocks, most = width // _BLOCK, vector.depth // _BLOCK
    steps = -(-blocks // most)
    if blocks >= most and 3 * steps * most > 4 * blocks:
        most //= 2
    return replace(vector, depth=_BLOCK * min(most, triton.next_power_of_2(blocks)))
