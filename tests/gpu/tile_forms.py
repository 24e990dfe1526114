"""Forms that a height of a tile table, or its products of few tokens, could have: present ones and others."""

from dataclasses import replace

from xpar.kernels.gpu.default_tables import HOPPER_HEIGHTS
from xpar.kernels.gpu.tile_tables import NO_LIMIT, Tile, Tiles, Vector

_16, _32, _64, _128_GATHERED, _128_TALL, _128_FLAT = (height.tiles for height in HOPPER_HEIGHTS)
assert _16 and _32 and _64 and _128_GATHERED and _128_TALL and _128_FLAT
_128 = replace(_128_FLAT, down=replace(_128_FLAT.down, flatten=False))
_128_TWO = Tiles(  # two programs a multiprocessor: one multiplies while the other begins or ends a tile
    Tile(128, 64, 64, stages=3, warps=4, per_sm=2, group=8),
    Tile(128, 128, 64, stages=3, warps=4, per_sm=2, group=8),
    swapped=False,
)
FORMS: dict[str, tuple[float, float, Tiles]] = {
    # name: averages of rows from and up to which it is tried, tiles
    "16": (0, 24, _16),
    "16 wide": (0, 11, replace(_16, gate_up=Tile(16, 128, 64, stages=3, warps=4, per_sm=2))),
    "32": (4, 50, _32),
    "32 deep": (
        4,
        50,
        Tiles(
            Tile(32, 64, 128, stages=4, warps=4, per_sm=1),
            Tile(32, 128, 128, stages=4, warps=4, per_sm=1),
            swapped=True,
        ),
    ),
    "32 wide": (
        11,
        50,
        Tiles(
            Tile(32, 128, 64, stages=5, warps=8, per_sm=1),
            Tile(32, 128, 128, stages=5, warps=8, per_sm=1),
            swapped=True,
        ),
    ),
    "64": (11, 100, _64),
    "64 wide": (
        24,
        100,
        Tiles(
            Tile(64, 128, 64, stages=4, warps=8, per_sm=1),
            Tile(64, 128, 128, stages=4, warps=8, per_sm=1),
            swapped=True,
        ),
    ),
    "64 rows first": (
        24,
        NO_LIMIT,
        Tiles(
            Tile(64, 128, 64, stages=5, warps=8, per_sm=1),
            Tile(64, 256, 64, stages=5, warps=8, per_sm=1),
            swapped=False,
            gathered=True,
        ),
    ),
    "128": (24, NO_LIMIT, _128),
    "128 tall": (50, NO_LIMIT, _128_TALL),
    "128 gathered": (50, NO_LIMIT, replace(_128, gathered=True)),
    "128 gathered, flat down": (24, NO_LIMIT, _128_GATHERED),
    "64 rows first, flat down": (
        24,
        NO_LIMIT,
        Tiles(
            Tile(64, 128, 64, stages=5, warps=8, per_sm=1, group=16),
            Tile(64, 256, 64, stages=4, warps=8, per_sm=1, group=16, flatten=True),
            swapped=False,
        ),
    ),
    "64 rows, two": (
        24,
        NO_LIMIT,
        Tiles(
            Tile(64, 64, 64, stages=4, warps=4, per_sm=2, group=16),
            Tile(64, 128, 64, stages=4, warps=4, per_sm=2, group=16),
            swapped=False,
        ),
    ),
    "128 two gathered": (24, 200, replace(_128_TWO, gathered=True)),
    "128 two": (24, 200, _128_TWO),
    "128 flat": (50, NO_LIMIT, _128_FLAT),
    "128 flat, three stages": (
        50,
        NO_LIMIT,
        replace(
            _128,
            gate_up=replace(_128.gate_up, stages=3),
            down=replace(_128.down, stages=3, flatten=True),
        ),
    ),
    "128 gathered flat": (
        100,
        NO_LIMIT,
        replace(
            _128,
            gathered=True,
            gate_up=replace(_128.gate_up, flatten=True),
            down=replace(_128.down, flatten=True),
        ),
    ),
    "128 group 16": (
        100,
        NO_LIMIT,
        replace(_128, gate_up=replace(_128.gate_up, group=16), down=replace(_128.down, group=16)),
    ),
}
VECTORS: dict[str, Vector] = {
    # other launches of the products of few tokens
    "2x2048": Vector(columns=2, depth=2048, stages=3, warps=8),
    "2x1024": Vector(columns=2, depth=1024, stages=3, warps=4),
    "4x1024": Vector(columns=4, depth=1024, stages=3, warps=4),
    "2x512": Vector(columns=2, depth=512, stages=4, warps=2),
    "4x512": Vector(columns=4, depth=512, stages=3, warps=2),
    "4x256, one warp": Vector(columns=4, depth=256, stages=2, warps=1),
    "4x512, one warp": Vector(columns=4, depth=512, stages=1, warps=1),
    "1x2048": Vector(columns=1, depth=2048, stages=4, warps=8),
    "2x4096": Vector(columns=2, depth=4096, stages=2, warps=8),
}
