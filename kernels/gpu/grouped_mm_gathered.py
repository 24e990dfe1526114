"""The first product for experts with many rows, which gathers its rows itself.

Rows come by pointers, weights through tensor descriptors, so that no launch copies rows into expert order
before it. Tiles are those of :mod:`xpar.kernels.gpu.grouped_mm_tiled`.

Tensors are contiguous: the stride of a row is its length. Each parameter of a kernel has its line.
"""

import triton
import triton.language as tl

from xpar.kernels.gpu.dependent_launch import wait_for_launch_before
from xpar.kernels.gpu.grouped_mm_small import source_rows
from xpar.kernels.gpu.grouped_mm_tiled import locate_tile, store_activated


@triton.jit(do_not_specialize=["capacity"])
def gate_up_gathered(
    x,  # [N, H], hidden states
    weight,  # [E, 2I, K], gate rows, then up rows, or [E, I, K] without a gate; zero from H to K
    bias,  # [E, 2I] or [E, I], or None
    hidden,  # [M k, I], result, in sorted order
    rows,  # [M] int64, row of x that each entry reads; None if entry m reads row m
    slots,  # [M k] int32, slot of each sorted row
    offsets,  # [E + 1] int32, first sorted row of each expert, then the number of active slots
    tile_expert,  # [4, capacity] int32, expert of each tile
    tile_row,  # [4, capacity] int32, first sorted row of each tile
    tile_count,  # [4] int32, tiles in each list
    capacity,  # tiles that fit into a list: stride of tile_expert and tile_row
    E: tl.constexpr,  # experts
    I: tl.constexpr,  # width of an expert
    H: tl.constexpr,  # elements of a row of x
    K: tl.constexpr,  # elements of a row of weight
    TOP_K: tl.constexpr,  # slots of an entry
    GATED: tl.constexpr,  # True if the weight has gate and up rows
    NAME: tl.constexpr,  # name of the activation
    LIMIT: tl.constexpr,  # its limit, None for no bound
    ALPHA: tl.constexpr,  # its alpha
    BETA: tl.constexpr,  # its beta
    BUCKET: tl.constexpr,  # list of tiles to compute: FEW, SOME or MANY
    BM: tl.constexpr,  # token rows of a tile
    BN: tl.constexpr,  # weight rows of a tile
    BK: tl.constexpr,  # addends of the sum at a time
    GROUP: tl.constexpr,  # tiles of token rows that go together through the blocks of columns
    PROGRAMS: tl.constexpr,  # programs of the launch, which share the tiles
    FLATTEN: tl.constexpr,  # True if the next tile's copies start before this tile's result is stored
    DEPENDENT: tl.constexpr,  # True if this launch may begin before the one before it has ended
):
    """Compute ``hidden[r] = act(weight[expert] @ x[row of r] + bias)`` for a bucket's rows r."""
    wait_for_launch_before(DEPENDENT)
    WIDE: tl.constexpr = 2 * I if GATED else I
    wd = tl.make_tensor_descriptor(weight, [E * WIDE, K], [K, 1], [BN, BK])
    num_n = tl.cdiv(I, BN)
    num_m = tl.load(tile_count + BUCKET)
    rk = tl.arange(0, BK)
    for tile in tl.range(tl.program_id(0), num_m * num_n, PROGRAMS, flatten=FLATTEN):
        expert, first, end, pn = locate_tile(
            tile, num_m, num_n, offsets, tile_expert, tile_row, capacity, BUCKET, GROUP
        )
        rm = first + tl.arange(0, BM)
        live = rm < end
        row = source_rows(tl.load(slots + rm, mask=live, other=0), rows, TOP_K, live)
        source = x + row[:, None] * H + rk[None, :]
        at = expert * WIDE + pn * BN
        gate = tl.zeros((BM, BN), tl.float32)
        up = tl.zeros((BM, BN), tl.float32)
        for k in range(0, K, BK):
            if H % BK == 0:
                a = tl.load(source + k, mask=live[:, None], other=0.0)
            else:
                a = tl.load(source + k, mask=live[:, None] & (rk + k < H)[None, :], other=0.0)
            gate = tl.dot(a, wd.load([at, k]).T, gate, input_precision="ieee")
            if GATED:
                up = tl.dot(a, wd.load([at + I, k]).T, up, input_precision="ieee")
        store_activated(
            gate, up, bias, hidden, first, end, expert, pn * BN, I, GATED, NAME, LIMIT, ALPHA, BETA, BM, BN
        )
