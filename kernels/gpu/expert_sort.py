"""A stable sort of the slots by expert, and the tiles of each expert, made on the device.

No count ever comes to the host. Few slots are ranked in one launch (:mod:`xpar.kernels.gpu.slot_ranks`).
Beyond that, blocks of 1024 slots are counted, the counts are scanned, and each block sorts itself and stores
every expert's run at its place. Where ranks are not wanted, one program sorts up to 1024 slots.

Tensors are contiguous: the stride of a row is its length. Each parameter of a kernel has its line. The
functions that kernels call have the kernels' parameters, and these:

- count, first: [WIDTH] int32, rows and first sorted row of each expert
- begin, end: first slot of a block, and the slot after its last one
- ROWS: rows of a tile
"""

from dataclasses import astuple, dataclass

import triton
import triton.language as tl
from torch import Tensor

from xpar.kernels.gpu.dependent_launch import launch_options
from xpar.kernels.gpu.slot_ranks import count_block, rank_kernel, write_tiles
from xpar.kernels.gpu.tile_tables import RANKED_SLOTS, Limits, Tile

BLOCK_SLOTS = 1024  # slots that one program sorts at most; a power of 2
_SIZES = (64, 256)  # slots; smaller blocks that the sort in one program is compiled for
_RANK_SIZES = (64, 512, 2048)  # slots; blocks that ranks are compiled for
_RANK_CHUNK = 16  # slots that one program ranks
_BLOCKS_AT_A_TIME = 32  # blocks whose counts are summed at a time


@dataclass(frozen=True)
class TilePlan:
    """The slots in expert order, and lists of tiles, all on the device.

    There is a list for each bucket and one for tall tiles.

    Attributes:
        slots: [M k] int32, slot of each sorted row.
        offsets: [E + 1] int32, first sorted row of each expert, then the number of active slots.
        tile_expert: [4, capacity] int32, expert of each tile.
        tile_row: [4, capacity] int32, first sorted row of each tile.
        tile_count: [4] int32, tiles in each list.
    """

    slots: Tensor
    offsets: Tensor
    tile_expert: Tensor
    tile_row: Tensor
    tile_count: Tensor

    @property
    def capacity(self) -> int:
        """The number of tiles that fit into a list."""
        return self.tile_expert.shape[1]


@triton.jit
def sort_block(ids, begin, end, E: tl.constexpr, BLOCK: tl.constexpr):
    """Return experts and slots of a block in stable order; slots without an expert come last."""
    place = tl.arange(0, BLOCK)
    expert = tl.load(ids + begin + place, mask=begin + place < end, other=-1)
    key = tl.sort(tl.where(expert < 0, E, expert) * BLOCK + place)
    return key // BLOCK, begin + key % BLOCK


@triton.jit(do_not_specialize=["num_slots", "capacity", "few", "some"])
def sort_kernel(
    ids,  # [num_slots] int32, expert of each slot, -1 for none
    slots,  # [num_slots] int32, result: slot of each sorted row
    offsets,  # [E + 1] int32, result: first sorted row of each expert, then the number of active slots
    tile_expert,  # [4, capacity] int32, result: expert of each tile
    tile_row,  # [4, capacity] int32, result: first sorted row of each tile
    tile_count,  # [4] int32, result: tiles in each list
    num_slots,  # M k, at most BLOCK
    capacity,  # tiles that fit into a list: stride of tile_expert and tile_row
    few,  # rows; the largest count of an expert in bucket FEW
    some,  # rows; the largest count of an expert in bucket SOME
    E: tl.constexpr,  # experts
    WIDTH: tl.constexpr,  # a power of 2 of at least E
    BLOCK: tl.constexpr,  # slots of the program, a power of 2
    ROWS_FEW: tl.constexpr,  # rows of a tile in FEW
    ROWS_SOME: tl.constexpr,  # rows of a tile in SOME
    ROWS_MANY: tl.constexpr,  # rows of a tile in MANY
    TALL: tl.constexpr,  # True if a fourth list gets the tall tiles
    ALONE: tl.constexpr,  # the one bucket that gets rows, or -1
):
    """Sort the slots and write the tiles in one program."""
    expert = tl.arange(0, WIDTH)
    count = count_block(ids, 0, num_slots, BLOCK, WIDTH)
    first = tl.cumsum(count, 0) - count
    tl.store(offsets + expert, first, mask=expert < E)
    tl.store(offsets + E, tl.sum(count, 0))
    write_tiles(count, first, tile_expert, tile_row, tile_count, capacity, few, some,
                ROWS_FEW, ROWS_SOME, ROWS_MANY, WIDTH, TALL, ALONE)  # fmt: skip
    slot_expert, slot = sort_block(ids, 0, num_slots, E, BLOCK)
    tl.store(slots + tl.arange(0, BLOCK), slot, mask=slot_expert < E)


@triton.jit(do_not_specialize=["num_slots"])
def count_kernel(
    ids,  # [num_slots] int32, expert of each slot, -1 for none
    counts,  # [blocks, WIDTH] int32, result
    num_slots,  # M k
    BLOCK: tl.constexpr,  # slots of a block
    WIDTH: tl.constexpr,  # a power of 2 of at least E
):
    """Count the slots of each expert in each block; grid: blocks."""
    block = tl.program_id(0)
    count = count_block(ids, block * BLOCK, num_slots, BLOCK, WIDTH)
    tl.store(counts + block * WIDTH + tl.arange(0, WIDTH), count)


@triton.jit(do_not_specialize=["blocks", "capacity", "few", "some"])
def scan_kernel(
    counts,  # [blocks, WIDTH] int32, slots of each expert in each block; result: shift of each run
    offsets,  # [E + 1] int32, result: first sorted row of each expert, then the number of active slots
    tile_expert,  # [4, capacity] int32, result: expert of each tile
    tile_row,  # [4, capacity] int32, result: first sorted row of each tile
    tile_count,  # [4] int32, result: tiles in each list
    blocks,  # number of blocks
    capacity,  # tiles that fit into a list: stride of tile_expert and tile_row
    few,  # rows; the largest count of an expert in bucket FEW
    some,  # rows; the largest count of an expert in bucket SOME
    E: tl.constexpr,  # experts
    WIDTH: tl.constexpr,  # a power of 2 of at least E
    ROWS: tl.constexpr,  # blocks whose counts are summed at a time
    ROWS_FEW: tl.constexpr,  # rows of a tile in FEW
    ROWS_SOME: tl.constexpr,  # rows of a tile in SOME
    ROWS_MANY: tl.constexpr,  # rows of a tile in MANY
    TALL: tl.constexpr,  # True if a fourth list gets the tall tiles
    ALONE: tl.constexpr,  # the one bucket that gets rows, or -1
):
    """Write offsets and tiles, and replace counts by shifts; one program.

    A shift is the distance of an expert's run in a sorted block from its final place.
    """
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
                ROWS_FEW, ROWS_SOME, ROWS_MANY, WIDTH, TALL, ALONE)  # fmt: skip
    before = first
    for block in range(0, blocks, ROWS):
        at = counts + (block + row)[:, None] * WIDTH + expert[None, :]
        live = (block + row < blocks)[:, None]
        count = tl.load(at, mask=live, other=0)
        earlier = tl.cumsum(count, 0) - count  # slots of the expert in the blocks above
        within = tl.cumsum(count, 1) - count  # first row of the expert's run in the sorted block
        tl.store(at, before[None, :] + earlier - within, mask=live)
        before += tl.sum(count, 0)


@triton.jit(do_not_specialize=["num_slots"])
def place_kernel(
    ids,  # [num_slots] int32, expert of each slot, -1 for none
    shifts,  # [blocks, WIDTH] int32, shift of each expert's run from its row in the sorted block
    slots,  # [num_slots] int32, result: slot of each sorted row
    num_slots,  # M k
    E: tl.constexpr,  # experts
    WIDTH: tl.constexpr,  # a power of 2 of at least E
    BLOCK: tl.constexpr,  # slots of a block, a power of 2
):
    """Sort each block and store its runs at their places; grid: blocks."""
    block = tl.program_id(0)
    expert, slot = sort_block(ids, block * BLOCK, num_slots, E, BLOCK)
    live = expert < E
    to = tl.load(shifts + block * WIDTH + expert, mask=live, other=0) + tl.arange(0, BLOCK)
    tl.store(slots + to, slot, mask=live)


def plan_tiles(
    topk_ids: Tensor,
    experts: int,
    tiles: tuple[Tile, Tile, Tile],
    limits: Limits,
    tall: bool = False,
    block_slots: int = BLOCK_SLOTS,
    ranked_slots: int = RANKED_SLOTS,
    dependent: bool = False,
) -> TilePlan:
    """Sort the slots by expert and cut them into tiles, without waiting for the device.

    Args:
        topk_ids: [M, k] int32, -1 to ``experts`` - 1, not empty.
        experts: E.
        tiles: a tile for each bucket; only ``rows`` is used.
        limits: the bounds of the buckets.
        tall: True if the last whole tile of an expert in MANY takes up to half a tile of rows on top.
        block_slots: slots that one program sorts at most, a power of 2.
        ranked_slots: slots up to which each finds its place by comparison with all others.
        dependent: True if a sort in one launch may begin before the launch before it has ended.
    """
    num_slots = topk_ids.numel()
    rows = [tile.rows for tile in tiles]
    capacity = experts + triton.cdiv(num_slots, min(rows))
    new = topk_ids.new_empty
    plan = TilePlan(new(num_slots), new(experts + 1), new(4, capacity), new(4, capacity), new(4))
    lists = (plan.offsets, plan.tile_expert, plan.tile_row, plan.tile_count)
    width = max(16, triton.next_power_of_2(experts))
    shape = {"E": experts, "WIDTH": width, "ROWS_FEW": rows[0], "ROWS_SOME": rows[1], "ROWS_MANY": rows[2],
             "TALL": tall, "ALONE": limits.launched[0] if len(limits.launched) == 1 else -1}  # fmt: skip
    if num_slots <= ranked_slots:
        block = next((size for size in _RANK_SIZES if num_slots <= size), _RANK_SIZES[-1])
        rank_kernel[(1 + triton.cdiv(num_slots, _RANK_CHUNK),)](
            topk_ids, plan.slots, *lists, num_slots, capacity, *astuple(limits), BLOCK=block,
            CHUNK=_RANK_CHUNK, num_warps=8 if block > 64 else 4, **shape,
            **launch_options(dependent),
        )  # fmt: skip
        return plan
    if num_slots <= block_slots:
        block = next((size for size in _SIZES if num_slots <= size), block_slots)
        sort_kernel[(1,)](
            topk_ids, plan.slots, *lists, num_slots, capacity, *astuple(limits), BLOCK=block, num_warps=4,
            **shape
        )  # fmt: skip
        return plan
    blocks = triton.cdiv(num_slots, block_slots)
    counts = new(blocks, width)
    count_kernel[(blocks,)](topk_ids, counts, num_slots, BLOCK=block_slots, WIDTH=width, num_warps=4)
    scan_kernel[(1,)](
        counts, *lists, blocks, capacity, *astuple(limits), ROWS=_BLOCKS_AT_A_TIME, num_warps=8, **shape
    )
    place_kernel[(blocks,)](
        topk_ids, counts, plan.slots, num_slots, E=experts, WIDTH=width, BLOCK=block_slots, num_warps=4
    )
    return plan
