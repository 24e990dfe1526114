"""The checked-in tile tables of the expert products, as plain data.

Why the heights that are expected to be faster on Hopper (:func:`expected_table`; no GPU has run them yet).
Experts whose rows straddle the limit between two lists cost two launches a
product, each of which reads about half of the weights and has a start and a tail of its own: 5 to 14 % of a
layer (H200). One height that nearly all experts of a batch fit into costs one launch; an expert with more
rows gets several tiles, whose weights come from the L2. With random routing an average of a rows has a
standard deviation of about the root of a, so each height ends where about one expert in ten exceeds it.
"""

from dataclasses import replace

import torch

from xpar.kernels.gpu.tile_tables import (
    NO_LIMIT,
    RANKED_SLOTS,
    VECTOR_BYTES,
    Height,
    Machine,
    Table,
    Tile,
    Tiles,
    Vector,
)

_SCALAR = Vector(columns=8, depth=512, stages=2, warps=4)
_SCALAR_DOWN = Vector(columns=4, depth=512, stages=3, warps=4)
# Measured on an H200, one token of OLMoE and Qwen3-30B layers: 5 to 9 % faster than the two above.
_HOPPER = Vector(columns=2, depth=2048, stages=3, warps=8)
_HOPPER_DOWN = Vector(columns=4, depth=1024, stages=3, warps=4)
# What each height is chosen for: 16 to 64 rows read weights, as two programs a multiprocessor with 100 KB in
# flight each. From 128 on arithmetic counts: a fourth stage is worth 5 % where tall tiles, which leave room
# for three, have few rows to save (below 100 rows and above 200; H200, all tables timed in turn).
_MANY_DEEP = Tiles(
    Tile(128, 128, 64, stages=4, warps=8, per_sm=1, group=8),
    Tile(128, 256, 64, stages=4, warps=8, per_sm=1, group=8),
    swapped=False,
)
HOPPER_HEIGHTS = (
    Height(
        11.0,
        Tiles(
            Tile(16, 64, 128, stages=3, warps=4, per_sm=2),
            Tile(16, 128, 128, stages=3, warps=4, per_sm=2),
            swapped=True,
        ),
    ),
    Height(
        24.0,
        Tiles(
            Tile(32, 64, 64, stages=5, warps=4, per_sm=2),
            Tile(32, 128, 64, stages=5, warps=4, per_sm=2),
            swapped=True,
        ),
    ),
    Height(
        50.0,
        Tiles(
            Tile(64, 64, 64, stages=4, warps=4, per_sm=2),
            Tile(64, 128, 64, stages=4, warps=4, per_sm=2),
            swapped=True,
        ),
    ),
    Height(100.0, _MANY_DEEP),
    Height(
        200.0,
        Tiles(
            Tile(128, 128, 64, stages=3, warps=8, per_sm=1, group=8),
            Tile(128, 256, 64, stages=3, warps=8, per_sm=1, group=8, flatten=True),
            swapped=False,
            tall=True,
        ),
    ),
    Height(NO_LIMIT, _MANY_DEEP),
)
# Keys: architecture, bytes per element. MANY of hopper is the fastest of 21 tables measured on an H200; the
# others come from register and shared-memory counts of compiled kernels. None spills, except tall tiles with
# a bias or a long activation: up to 88 bytes a thread, once a tile; gpt-oss has both, and was 7 % faster with
# tall tiles.
TABLES: dict[tuple[str, int], Table] = {
    ("hopper", 2): Table(
        gate_up=(
            Tile(16, 64, 128, stages=3, warps=4, per_sm=2),
            Tile(64, 64, 64, stages=4, warps=4, per_sm=2),
            Tile(128, 128, 64, stages=3, warps=8, per_sm=1, group=8),
        ),
        down=(
            Tile(16, 128, 128, stages=3, warps=4, per_sm=2),
            Tile(64, 128, 64, stages=4, warps=4, per_sm=2),
            Tile(128, 256, 64, stages=3, warps=8, per_sm=1, group=8, flatten=True),
        ),
        gate_up_vector=_HOPPER,
        down_vector=_HOPPER_DOWN,
        tall=True,
    ),
    ("blackwell", 2): Table(
        gate_up=(
            Tile(16, 64, 128, stages=3, warps=4, per_sm=2),
            Tile(64, 64, 64, stages=4, warps=4, per_sm=2),
            Tile(128, 128, 64, stages=4, warps=8, per_sm=1, group=8),
        ),
        down=(
            Tile(16, 128, 128, stages=3, warps=4, per_sm=2),
            Tile(64, 128, 64, stages=4, warps=4, per_sm=2),
            Tile(128, 128, 64, stages=4, warps=8, per_sm=1, group=8),
        ),
        gate_up_vector=_SCALAR,
        down_vector=_SCALAR_DOWN,
    ),
    ("ampere", 2): Table(
        gate_up=(
            Tile(16, 64, 64, stages=4, warps=4, per_sm=2),
            Tile(64, 64, 64, stages=3, warps=4, per_sm=2),
            Tile(128, 64, 64, stages=3, warps=8, per_sm=1, group=8),
        ),
        down=(
            Tile(16, 128, 64, stages=4, warps=4, per_sm=2),
            Tile(64, 128, 64, stages=3, warps=4, per_sm=2),
            Tile(128, 128, 64, stages=4, warps=8, per_sm=1, group=8),
        ),
        gate_up_vector=_SCALAR,
        down_vector=_SCALAR_DOWN,
    ),
    ("small", 2): Table(
        gate_up=(
            Tile(16, 64, 64, stages=3, warps=4, per_sm=1),
            Tile(64, 64, 64, stages=3, warps=4, per_sm=1),
            Tile(64, 64, 64, stages=3, warps=4, per_sm=1, group=8),
        ),
        down=(
            Tile(16, 128, 64, stages=3, warps=4, per_sm=1),
            Tile(64, 128, 64, stages=3, warps=4, per_sm=1),
            Tile(64, 64, 64, stages=3, warps=4, per_sm=1, group=8),
        ),
        gate_up_vector=_SCALAR,
        down_vector=_SCALAR_DOWN,
    ),
}
# float32 goes through scalar units (IEEE products), where a thread's registers bound the tile; one table for
# all.
_FLOAT32 = Table(
    gate_up=(
        Tile(16, 64, 32, stages=3, warps=4, per_sm=2),
        Tile(64, 64, 32, stages=2, warps=8, per_sm=1),
        Tile(64, 64, 32, stages=2, warps=8, per_sm=1, group=8),
    ),
    down=(
        Tile(16, 64, 32, stages=3, warps=4, per_sm=2),
        Tile(64, 64, 32, stages=3, warps=8, per_sm=1),
        Tile(64, 64, 32, stages=3, warps=8, per_sm=1, group=8),
    ),
    gate_up_vector=Vector(columns=8, depth=256, stages=2, warps=4),
    down_vector=Vector(columns=8, depth=256, stages=2, warps=4),
)


def default_table(machine: Machine, dtype: torch.dtype) -> Table:
    """Return the checked-in parameters for ``dtype`` on ``machine``."""
    return _FLOAT32 if dtype.itemsize == 4 else TABLES[machine.family, dtype.itemsize]


def expected_table(table: Table) -> Table:
    """Return ``table`` with the choices that should be faster on a Hopper GPU, which are not measured yet.

    One height a batch, sorts by ranks, few tokens by the bytes of an expert, steps that fit the width.
    """
    return replace(
        table,
        heights=HOPPER_HEIGHTS,
        ranked_slots=RANKED_SLOTS,
        vector_bytes=VECTOR_BYTES,
        fit_depth=True,
    )
