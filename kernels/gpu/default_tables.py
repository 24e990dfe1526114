"""The checked-in tile tables of the expert products, as plain data.

Why Hopper has heights instead of lists of tiles: experts whose rows straddle the limit between two lists cost
two launches a product, each of which reads about half of the weights and has a start and a tail of its own: 3
to 14 % of a layer at 64 and 257 tokens (H200). One height that nearly all experts of a batch fit into costs
one launch; an expert with more rows gets several tiles, whose weights come from the L2. With random routing
an average of a rows has a standard deviation of about the root of a, so each height ends where about one
expert in ten exceeds it. :func:`former_table` has the lists.
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
# Measured on an H200, one token: small programs are best where there are many (gpt-oss 10 %, Mixtral 8,
# Qwen3-235B and DeepSeek-V3 7 % faster than larger ones); they also leave fewer lanes idle at 2880.
_HOPPER = Vector(columns=4, depth=512, stages=3, warps=2)
# Large ones are best for experts of up to 1024 columns (OLMoE 2 %, Qwen3-30B 3 %).
_HOPPER_NARROW = Vector(columns=2, depth=2048, stages=3, warps=8)
_HOPPER_NARROW_DOWN = Vector(columns=4, depth=1024, stages=3, warps=4)
# What each height is chosen for: 16 to 64 rows read weights, as two programs a multiprocessor with 100 KB in
# flight each. From 128 on arithmetic counts, and the second product is flat, 4 to 6 % faster. Tall tiles,
# which leave room for three stages, pay between 100 and 200 rows, where they save half-empty tiles. Rows
# gathered in the product save their copy, 2 to 5 % below 100 rows and of narrow experts (H200, all forms
# timed in turn).
_MANY_FLAT = Tiles(
    Tile(128, 128, 64, stages=4, warps=8, per_sm=1, group=8),
    Tile(128, 256, 64, stages=4, warps=8, per_sm=1, group=8, flatten=True),
    swapped=False,
)
_MANY_GATHERED = replace(_MANY_FLAT, gathered=True)
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
    Height(100.0, _MANY_GATHERED),
    Height(
        200.0,
        Tiles(
            Tile(128, 128, 64, stages=3, warps=8, per_sm=1, group=8),
            Tile(128, 256, 64, stages=3, warps=8, per_sm=1, group=8, flatten=True),
            swapped=False,
            tall=True,
        ),
    ),
    Height(NO_LIMIT, _MANY_FLAT),
)
# Of experts with few columns, the copy of rows into order is a larger share of the whole.
HOPPER_NARROW_HEIGHTS = (*HOPPER_HEIGHTS[:3], Height(NO_LIMIT, _MANY_GATHERED))
NARROW = 1024
"""Columns of an expert up to which a layer on Hopper takes the choices for narrow experts."""
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
        down_vector=_HOPPER,
        tall=True,
        heights=HOPPER_HEIGHTS,
        ranked_slots=RANKED_SLOTS,
        vector_bytes=VECTOR_BYTES,
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


def default_table(machine: Machine, dtype: torch.dtype, width: int) -> Table:
    """Return the checked-in parameters for a layer on ``machine``.

    Args:
        machine: The GPU.
        dtype: Dtype of the weights.
        width: I, the columns of an expert.
    """
    if dtype.itemsize == 4:
        return _FLOAT32
    table = TABLES[machine.family, dtype.itemsize]
    return narrow_table(table) if machine.family == "hopper" and width <= NARROW else table


def narrow_table(table: Table) -> Table:
    """Return the table of Hopper with the choices for experts of few columns."""
    return replace(
        table,
        gate_up_vector=_HOPPER_NARROW,
        down_vector=_HOPPER_NARROW_DOWN,
        heights=HOPPER_NARROW_HEIGHTS,
        dependent=True,
    )


def former_table(table: Table) -> Table:
    """Return a table of Hopper as it was before it had heights: lists, sorts in blocks, few tokens by slots.

    Benchmarks time it beside the present choices. A table without heights is returned as it is.
    """
    if not table.heights:
        return table
    return replace(
        table,
        gate_up_vector=_HOPPER_NARROW,
        down_vector=_HOPPER_NARROW_DOWN,
        heights=(),
        ranked_slots=0,
        vector_bytes=None,
        dependent=False,
    )
