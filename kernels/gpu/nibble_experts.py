"""Experts on a GPU that keep nibbles and compute from them: int4, MXFP4 and NVFP4."""

from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from xpar.kernels.contracts import ExpertInput, ExpertSpec, check_expert_weights
from xpar.kernels.gpu.code_tables import (
    CodeTable,
    Height,
    default_nibble_table,
    has_dot8,
    most_registers,
    why_not_format,
)
from xpar.kernels.gpu.expert_sort import TilePlan, plan_tiles
from xpar.kernels.gpu.few_tokens import reads_little_again
from xpar.kernels.gpu.grouped_mm_decoded import down_decoded, gate_up_decoded
from xpar.kernels.gpu.grouped_mm_nibbles import down_nibbles, gate_up_nibbles
from xpar.kernels.gpu.grouped_mm_nibbles_vector import down_nibbles_vector, gate_up_nibbles_vector
from xpar.kernels.gpu.limits import round_up
from xpar.kernels.gpu.nibbles import SCALE_BYTES
from xpar.kernels.gpu.quantise_rows import split_rows
from xpar.kernels.gpu.slot_experts import CodeExperts, use_device_allocator
from xpar.kernels.gpu.tile_tables import NO_LIMIT, Limits, Machine, Tile, Vector
from xpar.kernels.quantised_weight import CodeType, QuantisedWeight

Terms = tuple[Tensor, Tensor, Tensor]
"""Rows as codes, scales and sums; see :func:`xpar.kernels.gpu.quantise_rows.split_rows`."""
_BLOCK = 128  # inputs; widths are rounded up to this, with nibbles of value zero
_SCALE_NAMES = {
    torch.float8_e8m0fnu: "e8m0", torch.float8_e4m3fn: "e4m3", torch.bfloat16: "bf16", torch.float16: "f16",
    torch.float32: "f32",
}  # fmt: skip
_UNITS = {CodeType.E2M1: 2.0**6, CodeType.INT4: 2.0**9}  # value of a code over its e4m3 pattern's


class NibbleExperts(CodeExperts):
    """An expert kernel that computes from int4 or e2m1 nibbles in groups of 16 to 128 inputs.

    Implements :class:`~xpar.kernels.contracts.QuantisedKernel`. Activations are as exact as in bfloat16.
    Memory and graphs: as :class:`~xpar.kernels.gpu.experts.TritonExperts`.

    Args:
        spec: the requirements of the layer, with a weight format.
        table: launch parameters; the checked-in ones of the machine if None.
        machine: the GPU to choose launches for; that of ``spec.device`` if None.
        has_asm: True for inline PTX, False for the same in Triton, which its interpreter can run.
    """

    name = "triton"
    terms = 2

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
        self._format = _Nibbles.of(spec)
        can_decode = spec.dtype == torch.bfloat16 and self._format.has_exact_scales
        self.table = table or default_nibble_table(self.machine, spec.weight_format, can_decode=can_decode)
        if not can_decode:
            self.table = self.table.without_decoded()
        e, h, i = spec.num_experts, spec.hidden_size, spec.intermediate_size
        self._width, self._depth = round_up(i, _BLOCK), round_up(h, _BLOCK)
        self._halves = 2 if spec.activation.gated else 1
        self._gate_up = self._format.new(e, self._halves * self._width, self._depth, spec.device)
        self._down_parts = self._format.new(e, h, self._width, spec.device)
        self._down = self._down_parts.codes
        self._factors = torch.ones(e, 2, dtype=torch.float32, device=spec.device)
        self._down_factors = torch.ones(e, dtype=torch.float32, device=spec.device)
        self._gate_up_bias = self._new(e, self._halves * self._width).zero_() if spec.bias else None
        self._down_bias = self._new(e, h).zero_() if spec.bias else None
        self._missing = set(range(e))

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
        unit = _UNITS[gate_up.format.code]
        for half in range(self._halves):
            source = slice(half * i, half * i + i)
            self._format.copy(gate_up, source, self._gate_up, index, half * self._width)
        self._format.copy(down, slice(0, h), self._down_parts, index, 0)
        self._load_biases(index, gate_up_bias, down_bias)
        for factors, weight in ((self._factors, gate_up), (self._down_factors, down)):
            factors[index] = unit if weight.global_scale is None else weight.global_scale * unit
        self._missing.discard(index)

    def nbytes(self) -> int:
        parts = (self._gate_up_bias, self._down_bias, self._factors, self._down_factors)
        return self._gate_up.nbytes + self._down_parts.nbytes + sum(t.nbytes for t in parts if t is not None)

    def is_tiny(self, x: ExpertInput) -> bool:
        """Return whether reading experts once for each slot costs less than sorting the slots."""
        tokens, top_k = x.topk_ids.shape
        if self.spec.row_invariant or not 0 < tokens <= self.table.vector_tokens:
            return False
        if x.hidden_states.data_ptr() % 8 or self.spec.hidden_size % 4 or self.spec.dtype.itemsize != 2:
            return False  # the products read four numbers at once
        expert_bytes = self.nbytes() // self.spec.num_experts
        return reads_little_again(self.spec, tokens, top_k, expert_bytes, self.table.vector_bytes)

    def _compute_tiny(self, x: ExpertInput, out: Tensor | None) -> Tensor:
        tokens, top_k = x.topk_ids.shape
        h, first, second = self.spec.hidden_size, self.table.gate_up_vector, self.table.down_vector
        ids, router_weights = x.topk_ids.contiguous(), x.topk_weights.float().contiguous()
        hidden = self._new(tokens * top_k, self._width)
        total = self._new(tokens, h) if out is None else out
        constants = {
            **self._format.constants,
            "BF16": self.spec.dtype == torch.bfloat16,
            "ASM": self._has_asm,
        }
        gate_up_nibbles_vector[(triton.cdiv(self._width, first.columns), tokens * top_k)](
            x.hidden_states.view(torch.int64), *self._gate_up.vector_tensors, self._factors,
            self._gate_up_bias, hidden, x.rows, ids, I=self._width, H=h, K=self._depth, TOP_K=top_k,
            **self._activation(), **constants, **self._vector_launch(first),
        )  # fmt: skip
        down_nibbles_vector[(triton.cdiv(h, second.columns), tokens)](
            hidden.view(torch.int64), *self._down_parts.vector_tensors, self._down_factors, self._down_bias,
            total, ids, router_weights, I=self._width, H=h, TOP_K=top_k,
            **constants, **self._vector_launch(second),
        )  # fmt: skip
        return total

    def _compute_all_slots(self, x: ExpertInput) -> Tensor:
        tokens, top_k = x.topk_ids.shape
        slots = tokens * top_k
        out = self._new(slots, self.spec.hidden_size)
        if not slots:
            return out
        use_device_allocator()
        exact = self.table.heights[self.table.exact]
        height = exact if self.spec.row_invariant else self.table.height(slots, self.spec.num_experts)
        tiles = (height.gate_up,) * 3
        plan = plan_tiles(x.topk_ids.contiguous(), self.spec.num_experts, tiles, Limits(NO_LIMIT, NO_LIMIT))
        if height.decoded:
            self._multiply_decoded(height, x, plan, out)
            return out
        rows = self.split(x.hidden_states, x.rows, self._depth)
        self.multiply_down(height, self.multiply_gate_up(height, rows, plan, top_k), plan, out)
        return out

    def split(self, x: Tensor, rows: Tensor | None, columns: int) -> Terms:
        """Return rows of ``x`` as the products take them; see :data:`Terms`."""
        return split_rows(
            x, rows, columns, parts=self._format.parts, half=self._format.half,
            has_sums=self._format.zero is not None, has_dot8=has_dot8(self.machine),
        )  # fmt: skip

    def multiply_gate_up(self, height: Height, rows: Terms, plan: TilePlan, top_k: int) -> Terms:
        """Return the activated rows in sorted order, as the second product takes them.

        Args:
            height: The tiles.
            rows: Those of the entries, from :meth:`split`.
            plan: The sorted slots and their tiles.
            top_k: Slots of an entry.
        """
        codes, scales, sums = rows
        slots = plan.slots.shape[0]
        hidden = (
            codes.new_empty(codes.shape[0], slots, self._width),
            scales.new_empty(self._width // _BLOCK, slots),
            scales.new_empty(self._width // self._format.half, slots),
        )
        lists = (plan.slots, plan.offsets, plan.tile_expert, plan.tile_row, plan.tile_count)
        gate_up_nibbles[self._persistent_grid(height.gate_up)](
            codes, scales, sums, *self._gate_up.tensors, self._factors, self._gate_up_bias, *hidden, *lists,
            codes.shape[1], slots, plan.capacity, K=self._depth, TOP_K=top_k, **self._shape(),
            **self._activation(), **self._constants(), **self._launch(height.gate_up),
        )  # fmt: skip
        return hidden

    def multiply_down(self, height: Height, hidden: Terms, plan: TilePlan, out: Tensor) -> None:
        """Write the outputs of all active slots to ``out`` [M k, H]; the rest as in ``multiply_gate_up``."""
        lists = (plan.slots, plan.offsets, plan.tile_expert, plan.tile_row, plan.tile_count)
        down_nibbles[self._persistent_grid(height.down)](
            *hidden, *self._down_parts.tensors, self._down_factors, self._down_bias, out, *lists,
            plan.slots.shape[0], plan.capacity, H=self.spec.hidden_size, **self._shape(),
            **self._constants(), **self._launch(height.down),
        )  # fmt: skip

    def _multiply_decoded(self, height: Height, x: ExpertInput, plan: TilePlan, out: Tensor) -> None:
        """Write the outputs of all active slots to ``out`` [M k, H], by weights that become bfloat16."""
        h, hidden = self.spec.hidden_size, self._new(out.shape[0], self._width)
        lists = (plan.slots, plan.offsets, plan.tile_expert, plan.tile_row, plan.tile_count, plan.capacity)
        constants = {**self._format.constants, "ASM": self._has_asm, "I": self._width, "H": h}
        first, second = height.gate_up, height.down
        gate_up_decoded[self._persistent_grid(first)](
            x.hidden_states, *self._gate_up.pairs, self._factors, self._gate_up_bias, hidden, x.rows,
            *lists, K=self._depth, TOP_K=x.topk_ids.shape[1], **self._activation(),
            **constants, **self._launch(first),
        )  # fmt: skip
        down_decoded[self._persistent_grid(second)](
            hidden, *self._down_parts.pairs, self._down_factors, self._down_bias, out, *lists,
            **constants, **self._launch(second),
        )  # fmt: skip

    def _shape(self) -> dict[str, int]:
        return {"E": self.spec.num_experts, "I": self._width, "PARTS": self._format.parts}

    def _constants(self) -> dict[str, Any]:
        return {**self._format.constants, "DOT8": has_dot8(self.machine), "ASM": self._has_asm}

    def _persistent_grid(self, tile: Tile) -> tuple[int]:
        return (self.machine.sms * tile.per_sm,)

    def _launch(self, tile: Tile) -> dict[str, Any]:
        return {
            "BM": tile.rows, "BN": tile.columns, "GROUP": tile.group,
            "PROGRAMS": self.machine.sms * tile.per_sm, "STAGES": tile.stages, "num_warps": tile.warps,
            "num_stages": tile.stages, "maxnreg": most_registers(tile),
        }  # fmt: skip

    def _vector_launch(self, vector: Vector) -> dict[str, Any]:
        steps = vector.depth // (2 * self._format.half)
        return {"BN": vector.columns, "BG": steps, "STAGES": vector.stages, "num_warps": vector.warps}


@dataclass(frozen=True)
class _Matrices:
    """The same matrix of every expert, in the kernels' layout.

    ``codes`` [E, steps, rows, half] uint8, ``words`` [E, blocks, words, rows] int32, ``zeros`` [E, blocks,
    rows] int32 or None.
    """

    codes: Tensor
    words: Tensor
    zeros: Tensor | None

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor | None]:
        return self.codes, self.words, self.zeros

    @property
    def pairs(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """The same with two bytes in a word."""
        return self.codes.view(torch.int16), self.words, self.zeros

    @property
    def vector_tensors(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """The same with eight nibbles in a word."""
        return self.codes.view(torch.int32), self.words, self.zeros

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in self.tensors if t is not None)


@dataclass(frozen=True)
class _Nibbles:
    """A format of nibbles as the kernels see it: see :mod:`xpar.kernels.gpu.nibbles`."""

    code: str
    scale: str
    group: int
    half: int
    zero: int | None
    zero_point: bool

    @staticmethod
    def of(spec: ExpertSpec) -> "_Nibbles":
        fmt = spec.weight_format
        assert fmt is not None
        group = min(fmt.block[1] or _BLOCK, _BLOCK)
        zero = 8 if fmt.code is CodeType.INT4 else None
        half = max(32, min(64, group))
        return _Nibbles(fmt.code.value, _SCALE_NAMES[fmt.scale], group, half, zero, fmt.zero_point)

    @property
    def has_exact_scales(self) -> bool:
        """Whether scales lose nothing where weights become bfloat16."""
        return self.group == 128 or self.scale not in ("f16", "f32")

    @property
    def parts(self) -> int:
        return 2 if self.group == 16 else 1

    @property
    def words(self) -> int:
        return max(1, _BLOCK // self.group * SCALE_BYTES[self.scale] // 4)

    @property
    def constants(self) -> dict[str, Any]:
        return {
            "CODE": self.code, "SCALE": self.scale, "WORDS": self.words, "G": self.group, "HALF": self.half,
            "ZERO": self.zero,
        }  # fmt: skip

    def new(self, experts: int, rows: int, depth: int, device: str) -> _Matrices:
        """Return matrices [rows, depth] whose values are all zero."""
        nothing = 0 if self.zero is None else 0x88
        codes = torch.full(
            (experts, depth // (2 * self.half), rows, self.half), nothing, dtype=torch.uint8, device=device
        )
        words = torch.zeros(experts, depth // _BLOCK, self.words, rows, dtype=torch.int32, device=device)
        zeros = torch.full_like(words[:, :, 0], 0x08080808) if self.zero_point else None
        return _Matrices(codes, words, zeros)

    def copy(self, weight: QuantisedWeight, rows: slice, to: _Matrices, expert: int, first: int) -> None:
        """Copy some rows of ``weight`` into those of ``expert`` from ``first`` on."""
        target = slice(first, first + rows.stop - rows.start)
        depth = to.codes.shape[1] * 2 * self.half
        bytes = weight.codes[rows]
        if weight.cols % 2 and self.zero is not None:  # the last byte's high nibble is no code
            bytes = bytes.clone()
            bytes[:, -1] = bytes[:, -1] & 15 | 0x80
        nibbles = torch.stack([bytes & 15, bytes >> 4], -1).flatten(1)
        nibbles = torch.nn.functional.pad(nibbles, (0, depth - nibbles.shape[1]), value=self.zero or 0)
        planes = nibbles.view(nibbles.shape[0], -1, 2, self.half)
        to.codes[expert, :, target].copy_((planes[:, :, 0] | planes[:, :, 1] << 4).transpose(0, 1))
        to.words[expert, :, :, target].copy_(self._pack(weight.scales[rows], weight, depth))
        if to.zeros is not None and weight.zeros is not None:
            to.zeros[expert, :, target].copy_(self._pack(weight.zeros[rows], weight, depth)[:, 0])

    def _pack(self, per_group: Tensor, weight: QuantisedWeight, depth: int) -> Tensor:
        """Return one value for each group [rows, groups] as words [blocks, words, rows] int32."""
        own, rows = weight.format.block[1] or weight.cols, per_group.shape[0]
        group = torch.arange(0, weight.cols, self.group, device=per_group.device) // own
        size = per_group.element_size()
        values = per_group.view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[size])[:, group]
        values = torch.nn.functional.pad(values, (0, depth // self.group - values.shape[1]))
        values = values.reshape(rows, depth // _BLOCK, -1)
        values = torch.nn.functional.pad(values, (0, -values.shape[2] % (4 // size)))
        return values.contiguous().view(torch.int32).permute(1, 2, 0)
