"""A stable sort of few slots by expert in one launch, and the lists of tiles that all sorts write.

Each slot's place is found by comparing it with all others: the work grows with the square of the slots, but
is spread over the whole GPU, and every program ends after one read of the ids.

Tensors are contiguous: the stride of a row is its length. Each parameter of a kernel has its line. The
functions that kernels call have the kernels' parameters, and these:

- count, first: [WIDTH] int32, rows and first sorted row of each expert
- begin, end: first slot of a block, and the slot after its last one
- ROWS: rows of a tile
"""

import triton
import triton.language as tl

from xpar.kernels.gpu.dependent_launch import wait_for_launch_before


@triton.jit
def write_list(count, first, tile_expert, tile_row, tile_count, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """Write one list of tiles: the rows of each expert in tiles of ROWS."""
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
    ROWS_FEW: tl.constexpr, ROWS_SOME: tl.constexpr, ROWS_MANY: tl.constexpr, WIDTH: tl.constexpr,
    TALL: tl.constexpr, ALONE: tl.constexpr,
):  # fmt: skip
    """Write the lists of all buckets, or the one of bucket ALONE, and the lengths of all.

    :class:`~xpar.kernels.gpu.tile_tables.Limits` defines the buckets. A tall tile has ROWS_MANY rows and up
    to half as many on top, the last rows of an expert in MANY.
    """
    if ALONE >= 0:
        number = tl.arange(0, 4)
        is_empty = (number != ALONE) & (number != 3 if ALONE == 2 and TALL else number >= 0)
        tl.store(tile_count + number, tl.zeros((4,), tl.int32), mask=is_empty)
    if ALONE < 0 or ALONE == 0:
        in_few = tl.where(count <= few, count, 0)
        write_list(in_few, first, tile_expert, tile_row, tile_count, ROWS_FEW, WIDTH)
    if ALONE < 0 or ALONE == 1:
        in_some = tl.where((count > few) & (count <= some), count, 0)
        at = capacity
        write_list(in_some, first, tile_expert + at, tile_row + at, tile_count + 1, ROWS_SOME, WIDTH)
    if ALONE < 0 or ALONE == 2:
        in_many = tl.where((count > few) & (count > some), count, 0)
        if TALL:
            rest = in_many % ROWS_MANY
            tall = (in_many > ROWS_MANY) & (rest > 0) & (rest <= ROWS_MANY // 2)
            in_many = tl.where(tall, in_many - rest - ROWS_MANY, in_many)
            one, start, at = tall.to(tl.int32), first + in_many, 3 * capacity
            write_list(one, start, tile_expert + at, tile_row + at, tile_count + 3, ROWS_MANY, WIDTH)
        at = 2 * capacity
        write_list(in_many, first, tile_expert + at, tile_row + at, tile_count + 2, ROWS_MANY, WIDTH)


@triton.jit
def count_block(ids, begin, end, BLOCK: tl.constexpr, WIDTH: tl.constexpr):
    """Return the number of slots of each expert in a block: [WIDTH] int32."""
    place = tl.arange(0, BLOCK)
    expert = tl.load(ids + begin + place, mask=begin + place < end, other=-1)
    return tl.histogram(tl.where(expert < 0, 0, expert), WIDTH, mask=expert >= 0)


@triton.jit(do_not_specialize=["num_slots", "capacity", "few", "some"])
def rank_kernel(
    ids,  # [num_slots] int32, expert of each slot, -1 for none
    slots,  # [num_slots] int32, result: slot of each sorted row
    offsets,  # [E + 1] int32, result: first sorted row of each expert, then the number of active slots
    tile_expert,  # [4, capacity] int32, result: expert of each tile
    tile_row,  # [4, capacity] int32, result: first sorted row of each tile
    tile_count,  # [4] int32, result: tiles in each list
    num_slots,  # M k; (E + 1) M k is below 2^31
    capacity,  # tiles that fit into a list: stride of tile_expert and tile_row
    few,  # rows; the largest count of an expert in bucket FEW
    some,  # rows; the largest count of an expert in bucket SOME
    E: tl.constexpr,  # experts
    WIDTH: tl.constexpr,  # a power of 2 of at least E
    BLOCK: tl.constexpr,  # slots that are read at a time, a power of 2
    CHUNK: tl.constexpr,  # slots that a program places, a power of 2
    ROWS_FEW: tl.constexpr,  # rows of a tile in FEW
    ROWS_SOME: tl.constexpr,  # rows of a tile in SOME
    ROWS_MANY: tl.constexpr,  # rows of a tile in MANY
    TALL: tl.constexpr,  # True if a fourth list gets the tall tiles
    ALONE: tl.constexpr,  # the one bucket that gets rows, or -1
    DEPENDENT: tl.constexpr,  # True if this launch may begin before the one before it has ended
):
    """Sort the slots and write the tiles; grid: one program for the tiles, then one for each chunk.

    A slot's sorted row is the number of slots that come before it. All programs read all ids, so none waits
    for another.
    """
    wait_for_launch_before(DEPENDENT)
    if tl.program_id(0) == 0:
        count = tl.zeros((WIDTH,), tl.int32)
        for begin in range(0, num_slots, BLOCK):
            count += count_block(ids, begin, num_slots, BLOCK, WIDTH)
        expert = tl.arange(0, WIDTH)
        first = tl.cumsum(count, 0) - count
        tl.store(offsets + expert, first, mask=expert < E)
        tl.store(offsets + E, tl.sum(count, 0))
        write_tiles(count, first, tile_expert, tile_row, tile_count, capacity, few, some,
                    ROWS_FEW, ROWS_SOME, ROWS_MANY, WIDTH, TALL, ALONE)  # fmt: skip
    else:
        own = (tl.program_id(0) - 1) * CHUNK + tl.arange(0, CHUNK)
        own_expert = tl.load(ids + own, mask=own < num_slots, other=-1)
        key = own_expert * num_slots + own
        row = tl.zeros((CHUNK,), tl.int32)
        for begin in range(0, num_slots, BLOCK):
            slot = begin + tl.arange(0, BLOCK)
            other = tl.load(ids + slot, mask=slot < num_slots, other=-1)
            other_key = tl.where(other < 0, E, other) * num_slots + slot
            row += tl.sum((other_key[None, :] < key[:, None]).to(tl.int32), 1)
        tl.store(slots + row, own, mask=own_expert >= 0)
