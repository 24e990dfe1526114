"""Tile shapes and launch parameters of the expert products, as plain data.

An expert's bucket follows from the number of its rows: ``FEW`` (by default up to 16), ``SOME`` (up to 64) or
``MANY`` (more). In the first two the weight tile is the tall operand of the matrix unit and the tokens are
its narrow side, so that a tile of 16 tokens wastes nothing; in the third it is the other way round.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

FEW, SOME, MANY = range(3)
NO_LIMIT = 2**31 - 1  # rows, more than any expert gets
RANKED_SLOTS = 4096
"""Slots up to which one launch that compares each with all others should be faster than three (H200)."""


@dataclass(frozen=True)
class Limits:
    """The bounds of the buckets, which the device applies to the counts of rows that it finds.

    Attributes:
        few: largest number of rows of an expert in FEW.
        some: largest number of rows of an expert in SOME; experts with more are in MANY.
    """

    few: int
    some: int

    @property
    def launched(self) -> tuple[int, ...]:
        """The buckets that can get tiles, ascending."""
        many = max(self.few, self.some) < NO_LIMIT
        used = (self.few > 0, self.some > self.few, many)
        return tuple(bucket for bucket in (FEW, SOME, MANY) if used[bucket])


@dataclass(frozen=True)
class Tile:
    """The tile and launch of one product in one bucket.

    Attributes:
        rows: token rows of a tile.
        columns: weight rows of a tile; in a gated gate-up product of the gate half, and as many of the up
            half.
        depth: addends of the sum at a time.
        stages: copies in flight.
        warps: warps of a program.
        per_sm: programs per multiprocessor.
        group: tiles of token rows that go together through the blocks of columns.
        flatten: True if the next tile's copies start before this tile's result is stored.
    """

    rows: int
    columns: int
    depth: int
    stages: int
    warps: int
    per_sm: int
    group: int = 1
    flatten: bool = False


@dataclass(frozen=True)
class Vector:
    """The block and launch of a product of one slot on scalar units.

    Attributes:
        columns: weight rows of a program.
        depth: addends of the sum at a time.
        stages: copies in flight.
        warps: warps of a program.
    """

    columns: int
    depth: int
    stages: int
    warps: int


@dataclass(frozen=True)
class Table:
    """All launch parameters of a layer.

    Attributes:
        gate_up: a tile for each bucket.
        down: a tile for each bucket, with the same ``rows`` as in ``gate_up``.
        gate_up_vector: the first product of batches of few tokens.
        down_vector: the second product of batches of few tokens.
        vector_tokens: number of tokens up to which a batch may take the vector products.
        limits: ``few`` and ``some`` of :class:`Limits`; :func:`choose_limits` skips buckets that a batch does
            not need.
        tall: True if the last whole tile of an expert in MANY takes the rest of the expert's rows, up to half
            a tile, on top.
    """

    gate_up: tuple[Tile, Tile, Tile]
    down: tuple[Tile, Tile, Tile]
    gate_up_vector: Vector
    down_vector: Vector
    vector_tokens: int = 4
    limits: tuple[int, int] = (16, 64)
    tall: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.limits[0] <= self.limits[1]:
            raise ValueError(f"limits {self.limits}: must be two numbers of rows, rising from 0 or more")
        for bucket, (first, second) in enumerate(zip(self.gate_up, self.down, strict=True)):
            if first.rows != second.rows:
                raise ValueError(
                    f"bucket {bucket}: gate_up has tiles of {first.rows} rows and down of {second.rows}; "
                    "both read one tile list, so give them the same number"
                )

    def to_dict(self) -> dict[str, Any]:
        """Return the table as plain JSON values, which :meth:`from_dict` reads."""
        return json.loads(json.dumps(self, default=vars))  # type: ignore[no-any-return]

    @staticmethod
    def from_dict(values: dict[str, Any]) -> "Table":
        """Read what :meth:`to_dict` wrote; raise TypeError or KeyError for unknown or missing names."""
        return Table(
            gate_up=_tiles_from_dicts(values["gate_up"]),
            down=_tiles_from_dicts(values["down"]),
            gate_up_vector=Vector(**values["gate_up_vector"]),
            down_vector=Vector(**values["down_vector"]),
            vector_tokens=int(values.get("vector_tokens", 4)),
            limits=_limits_from_list(values.get("limits", (16, 64))),
            tall=bool(values.get("tall", False)),
        )


@dataclass(frozen=True)
class Machine:
    """The properties of a GPU that launch parameters depend on.

    Attributes:
        sms: number of multiprocessors.
        capability: compute capability, (major, minor).
    """

    sms: int
    capability: tuple[int, int]

    @staticmethod
    def of(device: str | torch.device) -> "Machine":
        """Read the properties of a torch device ``cuda`` or ``cuda:N``."""
        found = torch.cuda.get_device_properties(device)
        return Machine(found.multi_processor_count, (found.major, found.minor))

    @property
    def family(self) -> str:
        """The key of ``TABLES``: hopper, blackwell or ampere (data centre), or small (99 KiB)."""
        if self.capability[0] in (9, 10):
            return "hopper" if self.capability[0] == 9 else "blackwell"
        return "ampere" if self.capability in ((8, 0), (8, 7)) else "small"


_SCALAR = Vector(columns=8, depth=512, stages=2, warps=4)
_SCALAR_DOWN = Vector(columns=4, depth=512, stages=3, warps=4)
# Measured on an H200, one token of OLMoE and Qwen3-30B layers: 5 to 9 % faster than the two above.
_HOPPER = Vector(columns=2, depth=2048, stages=3, warps=8)
_HOPPER_DOWN = Vector(columns=4, depth=1024, stages=3, warps=4)
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


def read_table(path: Path, machine: Machine, dtype: torch.dtype) -> Table | None:
    """Read the measured table for ``machine`` and ``dtype`` from a file; None if it has none.

    The file is a JSON list of ``{"sms", "capability", "itemsize", "table"}``. Raises ValueError, naming the
    file, for a malformed row.
    """
    for row in json.loads(path.read_bytes()):
        try:
            key = (int(row["sms"]), tuple(row["capability"]), int(row["itemsize"]))
            if key == (machine.sms, machine.capability, dtype.itemsize):
                return Table.from_dict(row["table"])
        except (KeyError, TypeError, ValueError) as why:
            raise ValueError(f"{path}: a row is no tile table ({why!r}); measure it again") from why
    return None


def write_table(path: Path, machine: Machine, dtype: torch.dtype, table: Table) -> None:
    """Write ``table`` to the file that :func:`read_table` reads; other machines' rows stay."""
    key = {"sms": machine.sms, "capability": list(machine.capability), "itemsize": dtype.itemsize}
    rows = json.loads(path.read_bytes()) if path.exists() else []
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{path}: not a file of tile tables; name another one")
    kept = [row for row in rows if {name: row.get(name) for name in key} != key]
    path.write_text(json.dumps([*kept, {**key, "table": table.to_dict()}], indent=1) + "\n")


def choose_limits(table: Table, tokens: int, slots: int, experts: int) -> Limits:
    """Choose the bounds of the buckets from the shape of a batch alone.

    Equal or unreachable bounds leave out buckets that the batch does not need, with their launches. An expert
    that then gets more rows than foreseen is computed in several tiles of the largest bucket that is left.

    Args:
        table: the launch parameters.
        tokens: M, entries of the batch.
        slots: M k, active or not.
        experts: E, experts of this rank.
    """
    few, some = table.limits
    average = slots / experts
    many = tokens > some and 8 * average >= 3 * some
    return Limits(
        few=NO_LIMIT if tokens <= few else few if average < 4 * few else 0,
        some=some if many else NO_LIMIT,
    )


def _tiles_from_dicts(tiles: list[dict[str, Any]]) -> tuple[Tile, Tile, Tile]:
    few, some, many = (Tile(**tile) for tile in tiles)
    return few, some, many


def _limits_from_list(rows: list[int]) -> tuple[int, int]:
    few, some = map(int, rows)
    return few, some
