"""Tile shapes and launch parameters of the products of codes, as plain data.

All experts of a batch get tiles of one height, which follows from the average number of their rows: every
product is one launch. An expert with more rows than a tile gets several tiles.

Why these tiles (H200: 132 multiprocessors, 227 KiB of shared memory and 65536 registers each):

- A step of the sum is 128 inputs, the block of an activation's scale: codes of 128 bytes are one row of the
  matrix unit's swizzle.
- A gate-up tile has 128 columns, because activated rows become codes with one scale for 128 columns.
- Up to 64 rows a tile the time is that of reading weights. In flight must be 4.2 TB/s x about 1 us / 132 = 32
  KB a multiprocessor. A step of gate-up is 32 KB of weights, of down 16 KB: two programs with three copies
  each have 130 KB in flight, and one multiplies while the other adds its partial sums.
- With 128 rows the partial sums need as many registers as half of the sums. 128 x (2 x 128) would be 256 of
  them a thread and spills 88 bytes; 128 x (2 x 64) twice in turn takes 241 registers and spills nothing.
"""

from dataclasses import dataclass, replace

from xpar.kernels.gpu.tile_tables import Machine, Tile, Vector
from xpar.kernels.quantised_weight import CodeType, WeightFormat

_BLOCK = 128  # inputs that share a scale of the activations

_SHARED = {"hopper": 227 << 10, "blackwell": 227 << 10, "ampere": 163 << 10, "small": 99 << 10}
"""Bytes of shared memory that the programs of a multiprocessor may use together."""
_LARGE_FAMILIES = ("hopper", "blackwell")
_REGISTERS = 65536  # of a multiprocessor, on every GPU that there are kernels for


@dataclass(frozen=True)
class Height:
    """The tiles of batches whose experts have up to ``average`` rows each, on average.

    Attributes:
        average: slots of the batch divided by experts.
        gate_up: tile of the first product; ``columns`` is 128, or 64 for two halves in turn if not swapped.
        down: tile of the second product, with the same ``rows``.
        swapped: True if the weights are the tall operand of the matrix unit.
        decoded: True if weights become bfloat16 in registers and rows stay it: ``swapped``, for the weights
            alone, and the layer in bfloat16. ``columns`` of gate_up is then 64 or 128, of gate rows and of up
            rows each.
    """

    average: float
    gate_up: Tile
    down: Tile
    swapped: bool
    decoded: bool = False

    def __post_init__(self) -> None:
        if self.gate_up.rows != self.down.rows:
            raise ValueError(
                f"gate_up has tiles of {self.gate_up.rows} rows and down of {self.down.rows}; both read one "
                "tile list, so give them the same number"
            )
        if self.gate_up.columns not in ((128,) if self.swapped and not self.decoded else (64, 128)):
            raise ValueError(
                f"gate_up has {self.gate_up.columns} columns: must be 128, the columns of a scale"
            )


@dataclass(frozen=True)
class CodeTable:
    """All launch parameters of a layer of codes.

    Attributes:
        heights: ascending by their averages; the last one takes all larger batches.
        gate_up_vector: the first product of batches of few tokens.
        down_vector: the second product of batches of few tokens.
        vector_tokens: number of tokens up to which a batch may take the vector products.
        vector_bytes: bytes of weights up to which reading an expert once for each of its slots costs less
            than the launches of a sort.
        exact: index of the height that every batch takes if bits must not depend on it.
    """

    heights: tuple[Height, ...]
    gate_up_vector: Vector
    down_vector: Vector
    vector_tokens: int = 4
    vector_bytes: int = 8 << 20
    exact: int = 0

    def height(self, slots: int, experts: int) -> Height:
        """Return the height for a batch of ``slots`` slots on ``experts`` experts."""
        average = slots / experts
        return next((h for h in self.heights if average <= h.average), self.heights[-1])

    def without_decoded(self) -> "CodeTable":
        """Return the table without heights whose weights become bfloat16; the others take their batches.

        Raises ValueError if no height is left.
        """
        kept = [h for h in self.heights if not h.decoded]
        if not kept:
            raise ValueError(
                "all heights of the table decode weights to bfloat16, which this layer's dtype or scales do "
                "not allow; add one that multiplies codes"
            )
        exact = min(sum(not h.decoded for h in self.heights[: self.exact]), len(kept) - 1)
        return replace(self, heights=(*kept[:-1], replace(kept[-1], average=float("inf"))), exact=exact)


# A vector program of the first product is one warp: each of its lanes has 16 bytes of four rows at a time, of
# gate and up rows. They take 128 registers, so that 16 programs a multiprocessor have 64 KB in flight. The
# second product is faster with programs of four warps (H200: 9.5 us in place of 11.2).
_VECTOR = Vector(columns=4, depth=512, stages=1, warps=1)
_VECTOR_DOWN = Vector(columns=4, depth=2048, stages=1, warps=4)
_FEW = Height(
    11.0,
    Tile(16, 128, 128, stages=3, warps=4, per_sm=2),
    Tile(16, 128, 128, stages=3, warps=4, per_sm=3),
    swapped=True,
)
_SOME = Height(
    24.0,
    Tile(32, 128, 128, stages=3, warps=4, per_sm=2),
    Tile(32, 128, 128, stages=3, warps=4, per_sm=3),
    swapped=True,
)
# From 24 rows on arithmetic counts, and two programs of 64 rows a multiprocessor are 1.25 times as fast as
# one of 128, at 64 as well as at 256 rows an expert (H200).
_LARGE = CodeTable(
    heights=(
        _FEW,
        _SOME,
        Height(
            float("inf"),
            Tile(64, 64, 128, stages=4, warps=4, per_sm=2, group=4),
            Tile(64, 128, 128, stages=3, warps=4, per_sm=3, group=4),
            swapped=False,
        ),
    ),
    gate_up_vector=_VECTOR,
    down_vector=_VECTOR_DOWN,
    exact=1,
)
# Rows of two codes an element need twice the shared memory and registers for the rows.
_LARGE_TWO_TERMS = replace(
    _LARGE,
    heights=(
        replace(_FEW, gate_up=Tile(16, 128, 128, stages=3, warps=8, per_sm=2)),
        replace(_SOME, gate_up=Tile(32, 128, 128, stages=3, warps=8, per_sm=2)),
        Height(
            float("inf"),
            Tile(64, 64, 128, stages=3, warps=4, per_sm=2, group=4),
            Tile(64, 128, 128, stages=3, warps=4, per_sm=2, group=4),
            swapped=False,
        ),
    ),
    gate_up_vector=Vector(columns=8, depth=512, stages=1, warps=1),
)
# Codes become float16 in registers, which the tallest tile has not: 64 rows are its limit.
_DECODED = replace(
    _LARGE,
    heights=(
        Height(
            16.0,
            Tile(16, 128, 128, stages=3, warps=8, per_sm=1),
            Tile(16, 128, 128, stages=3, warps=8, per_sm=1),
            swapped=True,
        ),
        Height(
            float("inf"),
            Tile(64, 64, 128, stages=3, warps=8, per_sm=1, group=8),
            Tile(64, 128, 128, stages=3, warps=8, per_sm=1, group=8),
            swapped=False,
        ),
    ),
)


# Nibbles: a step is 32 or 64 bytes a row, so copies are many and small: several programs a multiprocessor
# with three or four copies each have 100 KB in flight. Gate and up rows follow each other. Multiplied as
# codes, the sums of a block and of a group fill the registers from 32 rows on; tiles of 64 rows took 1.5
# times as long as twice as many of 32 (H200), so decoded weights take the larger batches.
_NIBBLES = CodeTable(
    heights=(
        Height(
            11.0,  # rows: five experts in a hundred have more than 16, and taller tiles take twice as long
            Tile(16, 128, 128, stages=3, warps=4, per_sm=3),
            Tile(16, 128, 128, stages=3, warps=4, per_sm=4),
            swapped=True,
        ),
        _SOME,
        Height(
            80.0,
            Tile(64, 64, 128, stages=3, warps=4, per_sm=2, group=4),
            Tile(64, 128, 128, stages=3, warps=8, per_sm=2, group=4),
            swapped=True,
            decoded=True,
        ),
        Height(
            float("inf"),
            Tile(128, 128, 128, stages=3, warps=8, per_sm=1, group=4),
            Tile(128, 64, 128, stages=3, warps=4, per_sm=2, group=4),
            swapped=True,
            decoded=True,
        ),
    ),
    gate_up_vector=Vector(columns=4, depth=1024, stages=1, warps=1),
    down_vector=Vector(columns=4, depth=1024, stages=1, warps=1),
    exact=1,
)
# With one scale for 128 inputs, a weight becomes bfloat16 without its scale, which the sum of a step takes:
# decoding is so cheap that it is the faster way for every batch (H200).
_NIBBLES_128 = CodeTable(
    heights=(
        Height(
            11.0,
            Tile(16, 64, 128, stages=3, warps=4, per_sm=4),
            Tile(16, 128, 128, stages=4, warps=4, per_sm=3),
            swapped=True,
            decoded=True,
        ),
        Height(
            24.0,
            Tile(32, 64, 128, stages=3, warps=4, per_sm=3),
            Tile(32, 128, 128, stages=3, warps=4, per_sm=3),
            swapped=True,
            decoded=True,
        ),
        Height(
            45.0,
            Tile(32, 128, 128, stages=3, warps=8, per_sm=2),
            Tile(32, 128, 128, stages=4, warps=4, per_sm=2),
            swapped=True,
            decoded=True,
        ),
        Height(
            float("inf"),
            Tile(64, 64, 128, stages=3, warps=4, per_sm=2, group=4),
            Tile(64, 128, 128, stages=3, warps=8, per_sm=2, group=4),
            swapped=True,
            decoded=True,
        ),
    ),
    gate_up_vector=Vector(columns=8, depth=1024, stages=1, warps=1),
    down_vector=Vector(columns=4, depth=1024, stages=1, warps=1),
    exact=1,
)


def default_nibble_table(machine: Machine, fmt: WeightFormat, *, can_decode: bool) -> CodeTable:
    """Return the checked-in parameters for nibbles on ``machine``.

    Args:
        machine: The GPU.
        fmt: The format of the weights.
        can_decode: Whether weights may become bfloat16, which the layer's dtype and scales decide.
    """
    columns = fmt.block[1]
    if not can_decode or machine.family not in _LARGE_FAMILIES:
        return _NIBBLES.without_decoded()
    return _NIBBLES if columns and columns % _BLOCK else _NIBBLES_128


def why_not_format(fmt: WeightFormat) -> str | None:
    """Return the reason why the kernels cannot compute from weights of a format, or None."""
    rows, columns = fmt.block
    if fmt.code is CodeType.E4M3 and (fmt.zero_point or columns % _BLOCK):
        return f"computes from e4m3 in blocks of a multiple of {_BLOCK} columns or whole rows, not from {fmt}"
    if fmt.code is CodeType.INT8:
        return f"does not compute from {fmt} weights"
    if fmt.code.is_nibble:
        fits = rows == 1 and (columns % _BLOCK == 0 or columns in (32, 64))
        if fmt.code is CodeType.E2M1 and not fmt.zero_point:
            fits = fits or (rows, columns) == (1, 16)
        if not fits:
            return f"computes from nibbles in groups of 32, 64 or 128 columns of a row, not from {fmt}"
    return None


def has_dot8(machine: Machine) -> bool:
    """Return whether the matrix unit multiplies e4m3."""
    return machine.capability >= (8, 9)


def most_registers(tile: Tile) -> int:
    """Return the registers a thread may have, so that ``per_sm`` programs fit on a multiprocessor."""
    return min(255, _REGISTERS // (tile.per_sm * tile.warps * 32) // 8 * 8)


def default_code_table(machine: Machine, terms: int) -> CodeTable:
    """Return the checked-in parameters for rows of ``terms`` codes an element on ``machine``."""
    large = _LARGE if terms == 1 else _LARGE_TWO_TERMS
    if machine.family == "hopper":  # as measured there: programs beyond those that fit wait for their turn
        return large
    table = large if machine.family in _LARGE_FAMILIES else _DECODED
    shared = _SHARED[machine.family]
    return replace(table, heights=tuple(_fit(height, terms, shared) for height in table.heights))


def _fit(height: Height, terms: int, shared: int) -> Height:
    """Return ``height`` with as many copies in flight as fit into shared memory."""

    def fit(tile: Tile, weight_rows: int) -> Tile:
        step = (terms * tile.rows + weight_rows) * tile.depth
        return replace(tile, stages=max(2, min(tile.stages, (shared // tile.per_sm - 2048) // step)))

    gate_up = fit(height.gate_up, 2 * height.gate_up.columns)
    return replace(height, gate_up=gate_up, down=fit(height.down, height.down.columns))
