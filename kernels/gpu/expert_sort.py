"""Which slots each expert has, and the tiles to compute them in: a stable sort by expert, decided on the device.

No count ever comes to the host. Up to 1024 slots one program does all of it; beyond that blocks of 1024 are counted,
their counts are summed up, and each block sorts itself and knows where every expert's run of it goes.
"""

from dataclasses import astuple, dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from xpar.kernels.gpu.tile_tables import Limits, Tile

_BLOCK = 1024
# What a sort in one program is compiled for; the smallest that holds the batch is used.
_SIZES = (64, 256, _BLOCK)
_ROWS = 32  # blocks whose counts are summed at a time


@dataclass(frozen=True)
class Plan:
    """Slots in expert order, and tiles of them.

    ``slots`` [M k] int32: slot of each sorted row; ``offsets`` [E + 1] int32: first sorted row of each expert, then
    their number. ``tile_expert``, ``tile_row`` [4, capacity] int32: expert and first sorted row of each tile, a list
    per bucket and one of tall tiles; ``tile_count`` [4] int32: how long the lists are. All on the device.
    """

    slots: Tensor
    offsets: Tensor
    tile_expert: Tensor
    tile_row: Tensor
    tile_count: Tensor

    @property
    def capacity(self) -> int:
        return self.tile_expert.shape[1]


@triton.jit
def write_list(count, first, tile_expert, tile_row, tile_count, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """One list of tiles: each expert's ``count`` rows, from row ``first``, in tiles of ROWS."""
    expert = tl.arange(0, WIDTH)
    tiles = (count + ROWS - 1) // ROWS
    at = tl.cumsum(tiles, 0) - tiles
    tl.store(tile_count, tl.sum(tiles, 0))
    for i in range(tl.max(tiles, 0)):
        tl.store(tile_expert + at + i, expert, mask=i < tiles)
        tl.store(tile_row + at + i, first + i * ROWS, mask=i < tiles)


@triton.jit
def write_tiles(
    count, first, tile_expert, tile_row, tile_count, capacity, few, some,
    ROWS_FEW: tl.constexpr, ROWS_SOME: tl.constexpr, ROWS_MANY: tl.constexpr, WIDTH: tl.constexpr, TALL: tl.constexpr,
):  # fmt: skip
    """The lists; see :class:`xpar.kernels.gpu.tile_tables.Limits`.

    TALL: a fourth list of tiles with ROWS_MANY rows and up to half as many on top, for the ends of experts with many.
    """
    many = (count > few) & (count > some)
    in_some = (count > few) & (count <= some)
    write_list(tl.where(count <= few, count, 0), first, tile_expert, tile_row, tile_count, ROWS_FEW, WIDTH)
    write_list(tl.where(in_some, count, 0), first,
               tile_expert + capacity, tile_row + capacity, tile_count + 1, ROWS_SOME, WIDTH)  # fmt: skip
    in_many = tl.where(many, count, 0)
    if TALL:
        rest = in_many % ROWS_MANY
        tall = (in_many > ROWS_MANY) & (rest > 0) & (rest <= ROWS_MANY // 2)
        in_many = tl.where(tall, in_many - rest - ROWS_MANY, in_many)
        write_list(tall.to(tl.int32), first + in_many,
                   tile_expert + 3 * capacity, tile_row + 3 * capacity, tile_count + 3, ROWS_MANY, WIDTH)  # fmt: skip
    write_list(in_many, first,
               tile_expert + 2 * capacity, tile_row + 2 * capacity, tile_count + 2, ROWS_MANY, WIDTH)  # fmt: skip


@triton.jit
def sorted_block(ids, begin, end, E: tl.constexpr, BLOCK: tl.constexpr):
    """Experts and slots of ``ids[begin : end]`` (at most BLOCK) in stable order; foreign slots come last, as E."""
    place = tl.arange(0, BLOCK)
    expert = tl.load(ids + begin + place, mask=begin + place < end, other=-1)
    key = tl.sort(tl.where(expert < 0, E, expert) * BLOCK + place)
    return key // BLOCK, begin + key % BLOCK


@triton.jit
def histogram(ids, begin, end, BLOCK: tl.constexpr, WIDTH: tl.constexpr):
    place = tl.arange(0, BLOCK)
    expert = tl.load(ids + begin + place, mask=begin + place < end, other=-1)
    return tl.histogram(tl.where(expert < 0, 0, expert), WIDTH, mask=expert >= 0)


@triton.jit(do_not_specialize=["num_slots", "capacity", "few", "some"])
def sort_kernel(
    ids, slots, offsets, tile_expert, tile_row, tile_count, num_slots, capacity, few, some,
    E: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
    ROWS_FEW: tl.constexpr, ROWS_SOME: tl.constexpr, ROWS_MANY: tl.constexpr, TALL: tl.constexpr,
):  # fmt: skip
    """All of it in one program, for up to BLOCK slots."""
    expert = tl.arange(0, WIDTH)
    count = histogram(ids, 0, num_slots, BLOCK, WIDTH)
    first = tl.cumsum(count, 0) - count
    tl.store(offsets + expert, first, mask=expert < E)
    tl.store(offsets + E, tl.sum(count, 0))
    write_tiles(count, first, tile_expert, tile_row, tile_count, capacity, few, some,
                ROWS_FEW, ROWS_SOME, ROWS_MANY, WIDTH, TALL)  # fmt: skip
    its, slot = sorted_block(ids, 0, num_slots, E, BLOCK)
    tl.store(slots + tl.arange(0, BLOCK), slot, mask=its < E)


@triton.jit(do_not_specialize=["num_slots"])
def count_kernel(ids, counts, num_slots, BLOCK: tl.constexpr, WIDTH: tl.constexpr):
    """``counts`` [blocks, WIDTH]: slots of each expert in each block."""
    block = tl.program_id(0)
    count = histogram(ids, block * BLOCK, num_slots, BLOCK, WIDTH)
    tl.store(counts + block * WIDTH + tl.arange(0, WIDTH), count)


@triton.jit(do_not_specialize=["blocks", "capacity", "few", "some"])
def scan_kernel(
    counts, offsets, tile_expert, tile_row, tile_count, blocks, capacity, few, some,
    E: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr,
    ROWS_FEW: tl.constexpr, ROWS_SOME: tl.constexpr, ROWS_MANY: tl.constexpr, TALL: tl.constexpr,
):  # fmt: skip
    """One program: offsets, tiles, and in place of each count how far the block's run moves when it is placed."""
    expert = tl.arange(0, WIDTH)
    row = tl.arange(0, ROWS)
    total = tl.zeros((WIDTH,), tl.int32)
    for block in range(0, blocks, ROWS):
        at = counts + (block + row)[:, None] * WIDTH + expert[None, :]
        total += tl.sum(tl.load(at, mask=(block + row < blocks)[:, None], other=0), 0)
    first = tl.cumsum(total, 0) - total
    tl.store(offsets + expert, first, mask=expert < E)
    tl.store(offsets + E, tl.sum(total, 0))
    write_tiles(total, first, tile_expert, tile_row, tile_count, capacity, few, some,
                ROWS_FEW, ROWS_SOME, ROWS_MANY, WIDTH, TALL)  # fmt: skip
    before = first
    for block in range(0, blocks, ROWS):
        at = counts + (block + row)[:, None] * WIDTH + expert[None, :]
        live = (block + row < blocks)[:, None]
        count = tl.load(at, mask=live, other=0)
        earlier = tl.cumsum(count, 0) - count  # in the blocks above
        within = tl.cumsum(count, 1) - count  # where the expert's run begins in the sorted block
        tl.store(at, before[None, :] + earlier - within, mask=live)
        before += tl.sum(count, 0)


@triton.jit(do_not_specialize=["num_slots"])
def place_kernel(ids, moves, slots, num_slots, E: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Each block sorts itself and writes its runs to their places."""
    block = tl.program_id(0)
    expert, slot = sorted_block(ids, block * BLOCK, num_slots, E, BLOCK)
    live = expert < E
    to = tl.load(moves + block * WIDTH + expert, mask=live, other=0) + tl.arange(0, BLOCK)
    tl.store(slots + to, slot, mask=live)


def make_plan(
    topk_ids: Tensor, experts: int, tiles: tuple[Tile, Tile, Tile], limits: Limits, tall: bool = False
) -> Plan:
    """Sort the slots of ``topk_ids`` [M, k] int32 (ids in [-1, experts)) and cut them into tiles; M k >= 1.

    ``tiles`` gives the rows of a tile in each bucket. ``tall``: the last tile of an expert with many rows takes up to half
    as many on top.
    """
    num_slots = topk_ids.numel()
    rows = [tile.rows for tile in tiles]
    capacity = experts + triton.cdiv(num_slots, min(rows))
    new = topk_ids.new_empty
    plan = Plan(new(num_slots), new(experts + 1), new(4, capacity), new(4, capacity), new(4))
    lists = (plan.offsets, plan.tile_expert, plan.tile_row, plan.tile_count)
    width = max(16, triton.next_power_of_2(experts))
    shape = {"E": experts, "WIDTH": width, "ROWS_FEW": rows[0], "ROWS_SOME": rows[1], "ROWS_MANY": rows[2],
             "TALL": tall}  # fmt: skip
    if num_slots <= _BLOCK:
        block = next(size for size in _SIZES if num_slots <= size)
        sort_kernel[(1,)](
            topk_ids, plan.slots, *lists, num_slots, capacity, *astuple(limits), BLOCK=block, num_warps=4, **shape
        )  # fmt: skip
        return plan
    blocks = triton.cdiv(num_slots, _BLOCK)
    counts = new(blocks, width)
    count_kernel[(blocks,)](topk_ids, counts, num_slots, BLOCK=_BLOCK, WIDTH=width, num_warps=4)
    scan_kernel[(1,)](counts, *lists, blocks, capacity, *astuple(limits), ROWS=_ROWS, num_warps=8, **shape)
    place_kernel[(blocks,)](
        topk_ids, counts, plan.slots, num_slots, E=experts, WIDTH=width, BLOCK=_BLOCK, num_warps=4
    )
    return plan


def plan_reference(topk_ids: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    """What a plan's ``slots`` (up to the number of active ones) and ``offsets`` are, by definition; int64."""
    flat = topk_ids.reshape(-1).cpu()
    slots = torch.sort(flat, stable=True).indices[int((flat < 0).sum()) :]
    counts = torch.bincount(flat[flat >= 0], minlength=experts)
    return slots, torch.cat([counts.new_zeros(1), counts.cumsum(0)])
