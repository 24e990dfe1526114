"""The launch parameters of quantised weights that ``benchmarks/code_tables.py`` tries."""

from dataclasses import dataclass, replace
from typing import Any

from xpar.kernels.gpu.code_tables import CodeTable, Height
from xpar.kernels.gpu.tile_tables import Tile, Vector
from xpar.kernels.quantised_weight import WeightFormat

MOST_VECTOR_TOKENS = 4

# rows: (columns, stages, warps, programs per multiprocessor) of gate_up, then of down, tried together
Launches = tuple[tuple[tuple[int, int, int, int], tuple[int, int, int, int]], ...]
TWO_TERMS: dict[int, Launches] = {
    16: (
        ((128, 4, 4, 2), (128, 4, 4, 3)),
        ((128, 6, 4, 2), (128, 6, 4, 3)),
        ((128, 3, 4, 3), (128, 3, 4, 4)),
        ((128, 4, 8, 1), (128, 4, 4, 2)),
        ((128, 2, 4, 4), (128, 2, 4, 6)),
        ((128, 3, 8, 2), (128, 5, 4, 3)),
        ((128, 2, 4, 3), (128, 3, 4, 3)),
    ),
    32: (
        ((128, 4, 8, 1), (128, 4, 8, 1)),
        ((128, 3, 4, 2), (128, 3, 4, 2)),
        ((128, 3, 8, 2), (128, 3, 4, 3)),
    ),
    64: (((128, 3, 8, 1), (128, 3, 8, 1)), ((128, 3, 4, 2), (128, 3, 4, 2))),
}
DECODED: dict[int, Launches] = {
    16: (
        ((64, 4, 4, 2), (128, 4, 4, 2)),
        ((64, 4, 4, 3), (128, 4, 4, 3)),
        ((64, 3, 4, 4), (128, 3, 4, 4)),
        ((64, 6, 4, 2), (64, 4, 4, 4)),
        ((128, 4, 4, 2), (64, 6, 4, 3)),
        ((128, 4, 8, 1), (128, 4, 8, 2)),
    ),
    32: (
        ((64, 4, 4, 2), (128, 4, 4, 2)),
        ((64, 3, 4, 3), (128, 3, 4, 3)),
        ((64, 4, 4, 3), (64, 4, 4, 4)),
        ((128, 4, 8, 1), (128, 4, 8, 1)),
        ((128, 3, 8, 2), (128, 4, 8, 2)),
    ),
    64: (
        ((64, 4, 4, 1), (64, 4, 4, 3)),
        ((64, 3, 4, 2), (64, 3, 4, 2)),
        ((128, 3, 8, 1), (128, 3, 8, 1)),
        ((128, 4, 8, 1), (128, 3, 8, 2)),
    ),
    128: (
        ((64, 3, 4, 1), (64, 3, 4, 2)),
        ((64, 3, 8, 1), (128, 3, 8, 1)),
        ((128, 3, 8, 1), (128, 4, 8, 1)),
        ((128, 4, 8, 1), (64, 3, 4, 3)),
    ),
}
CODES: dict[int, Launches] = {
    16: (
        ((128, 3, 4, 2), (128, 4, 4, 3)),
        ((128, 2, 4, 3), (128, 3, 4, 3)),
        ((128, 3, 8, 2), (128, 5, 4, 2)),
    ),
    32: (
        ((128, 3, 4, 2), (128, 4, 4, 2)),
        ((128, 3, 8, 2), (128, 3, 4, 3)),
        ((128, 5, 8, 1), (128, 4, 8, 2)),
    ),
    64: (((128, 4, 8, 1), (128, 4, 4, 2)), ((128, 2, 8, 2), (128, 3, 8, 2))),
}
WIDE: dict[int, Launches] = {
    64: (((64, 4, 4, 2), (128, 4, 4, 2)), ((64, 3, 4, 3), (128, 3, 4, 3))),
    128: (
        ((64, 4, 8, 1), (128, 5, 8, 1)),
        ((64, 3, 8, 1), (128, 4, 8, 1)),
        ((64, 5, 8, 1), (64, 4, 8, 2)),
    ),
}
# weight rows, warps and copies in flight of a vector program
VECTORS = (
    *((columns, warps, 1) for warps in (1, 2) for columns in (2, 4, 8)),
    *((4, 4, 1), (4, 1, 2), (8, 1, 2), (4, 1, 3)),
)


@dataclass(frozen=True)
class Trial:
    """The launch parameters of both products.

    Attributes:
        gate_up: a tile, or a vector for batches without a sort.
        down: the same of the second product.
        swapped: of tiles, as in :class:`~xpar.kernels.gpu.code_tables.Height`.
        decoded: of tiles, as there.
    """

    gate_up: Tile | Vector
    down: Tile | Vector
    swapped: bool = True
    decoded: bool = False

    @property
    def is_vector(self) -> bool:
        return isinstance(self.gate_up, Vector)

    @property
    def kind(self) -> tuple[Any, ...]:
        """Return what both products must have in common."""
        rows = 0 if isinstance(self.gate_up, Vector) else self.gate_up.rows
        return rows, self.swapped, self.decoded

    def change(self, table: CodeTable) -> CodeTable:
        """Return ``table`` with this trial for every batch, or for every batch of few tokens."""
        if isinstance(self.gate_up, Vector) or isinstance(self.down, Vector):
            return replace(
                table,
                gate_up_vector=self.gate_up,  # type: ignore[arg-type]
                down_vector=self.down,  # type: ignore[arg-type]
                vector_tokens=MOST_VECTOR_TOKENS,
            )
        height = Height(float("inf"), self.gate_up, self.down, self.swapped, self.decoded)
        return replace(table, heights=(height,), vector_tokens=0, exact=0)

    def __str__(self) -> str:
        def show(v: Tile | Vector) -> str:
            if isinstance(v, Vector):
                return f"{v.columns}x{v.depth} stages {v.stages} warps {v.warps}"
            return f"{v.rows}x{v.columns} stages {v.stages} warps {v.warps} per_sm {v.per_sm} group {v.group}"

        kind = "vector" if self.is_vector else "decoded" if self.decoded else "codes"
        return f"{kind}{'' if self.swapped else ', rows tall'} [{show(self.gate_up)}] [{show(self.down)}]"


def trials(fmt: WeightFormat, is_alone: bool, tokens: int, average: float) -> list[Trial]:
    """Return what to try for a batch of ``tokens`` tokens with ``average`` rows an expert.

    ``is_alone``: True if the layer does not quantise activations.
    """
    rows = [r for r in (16, 32, 64, 128) if r >= min(average, 64) and r <= max(16, 4 * average)]
    found = []
    if tokens <= MOST_VECTOR_TOKENS:
        inputs = 1024 if fmt.code.is_nibble else 512  # of 32 lanes
        for columns, warps, stages in VECTORS:
            vector = Vector(columns, inputs * warps, stages, warps)
            found.append(Trial(vector, vector))
    families = ((TWO_TERMS, True, False), (DECODED, True, True))
    if not fmt.code.is_nibble:
        families = (
            (CODES, True, False),
            (WIDE, False, False),
            *(((DECODED, True, True),) if is_alone else ()),
        )
    for table, swapped, decoded in families:
        for r in rows:
            for first, second in table.get(r, ()):
                group = 4 if r >= 64 else 1
                found.append(Trial(_tile(r, first, group), _tile(r, second, group), swapped, decoded))
    return found


def _tile(rows: int, launch: tuple[int, int, int, int], group: int) -> Tile:
    columns, stages, warps, per_sm = launch
    return Tile(rows, columns, 128, stages, warps, per_sm, group)
