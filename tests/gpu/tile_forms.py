"""Forms that a height of a tile table could have, as data: the present ones and others worth a trial."""

from dataclasses import replace

from xpar.kernels.gpu.default_tables import HOPPER_HEIGHTS
from xpar.kernels.gpu.tile_tables import NO_LIMIT, Tile, Tiles

_16, _32, _64, _128, _128_TALL = (height.tiles for height in HOPPER_HEIGHTS[:5])
assert _16 and _32 and _64 and _128 and _128_TALL
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
        100,
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
    "128 two gathered": (24, 200, replace(_128_TWO, gathered=True)),
    "128 two": (24, 200, _128_TWO),
    "128 flat": (50, NO_LIMIT, replace(_128, down=replace(_128.down, flatten=True))),
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
