"""Launches that begin before the launch before them has ended (Hopper: programmatic dependent launch).

Programs are placed while the last ones of the launch before still run, and wait there before they read or
write anything: what is saved is the gap between two launches. Every kernel that is launched so waits for all
of the launch before, which itself has waited, so that all earlier launches have ended, too. The wait comes
before descriptors are made: their memory may be that of the launch before.
"""

import triton
import triton.language as tl


@triton.jit
def wait_for_launch_before(DEPENDENT: tl.constexpr):
    """Wait until the launch before has ended, if DEPENDENT; the next launch may then begin to be placed."""
    if DEPENDENT:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def prefetch_tile(
    weight, tile, rows, E: tl.constexpr, WIDE: tl.constexpr, K: tl.constexpr, BN: tl.constexpr,
    BYTES: tl.constexpr,
):  # fmt: skip
    """Fetch the first BYTES of each weight row of a tile into the L2, before it is known whose tile it is.

    Args:
        weight: [E, WIDE, K].
        tile: number of a tile, of one row of tiles an expert.
        rows: rows of an expert that are cut into blocks of BN, each a column of tiles.
        E: experts.
        WIDE: rows of an expert.
        K: elements of a row.
        BN: rows of a block.
        BYTES: a multiple of 16; 0 fetches nothing.
    """
    if BYTES > 0:
        blocks = tl.cdiv(rows, BN)
        row = tile % blocks * BN + tl.arange(0, BN)
        # Where each expert has rows, and few enough for one tile, tile n is of expert n / blocks.
        expert = tl.minimum(tile // blocks, E - 1).to(tl.int64)
        at = weight + (expert * WIDE + tl.minimum(row, rows - 1)) * K
        size = tl.full((BN,), BYTES, tl.int32)
        tl.inline_asm_elementwise(
            "cp.async.bulk.prefetch.L2.global [$1], $2; mov.b32 $0, 0;", "=r,l,r", [at.to(tl.int64), size],
            dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip


def launch_options(dependent: bool) -> dict[str, bool]:
    """Return the options of a launch of a kernel that has DEPENDENT."""
    # Interpreters and other back ends know no such launch: they are not asked for it.
    return {"DEPENDENT": True, "launch_pdl": True} if dependent else {"DEPENDENT": False}
