"""Tile shapes and launch parameters of the expert products, as plain data.

A table may have heights: all experts of a batch then get tiles of one height, which follows from the average
number of their rows, and every product is one launch. Otherwise there are lists of tiles, one for each
bucket. An expert's bucket follows from the number of its rows: ``FEW`` (by default up to 16), ``SOME`` (up
to 64) or ``MANY`` (more). In the first two the weight tile is the tall operand of the matrix unit and the
tokens are its narrow side, so that a tile of 16 tokens wastes nothing; in the third it is the other way
round.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

FEW, SOME, MANY = range(3)
NO_LIMIT = 2**31 - 1  # rows, more than any expert gets
RANKED_SLOTS = 4096
"""Slots up to which one launch that compares each with all others is faster than three (H200)."""
VECTOR_BYTES = 50_000_000
"""Bytes of weights that take as long to read again as sort, sum and two launches (H200)."""


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
class Tiles:
    """The tiles of one list of rows: a launch of each product.

    Attributes:
        gate_up: tile of the first product.
        down: tile of the second product, with the same ``rows``.
        swapped: True if the weights are the tall operand of the matrix unit.
        tall: True if the last whole tile of an expert takes the rest of its rows, up to half a tile, on top.
        gathered: True if the first product gathers its rows itself; False if they are copied into expert
            order before it. A swapped product always gathers.
    """

    gate_up: Tile
    down: Tile
    swapped: bool
    tall: bool = False
    gathered: bool = False

    def __post_init__(self) -> None:
        if self.gate_up.rows != self.down.rows:
            raise ValueError(
                f"gate_up has tiles of {self.gate_up.rows} rows and down of {self.down.rows}; "
                "both read one tile list, so give them the same number"
            )
        if self.tall and (self.swapped or self.gathered):
            raise ValueError("tall tiles need rows in expert order: swapped and gathered must be false")


@dataclass(frozen=True)
class Height:
    """The tiles of batches whose experts have up to ``average`` rows each, on average.

    ``tiles`` None: such batches take the lists of the table's buckets.
    """

    average: float
    tiles: Tiles | None


@dataclass(frozen=True)
class Layout:
    """The lists of tiles that a batch is cut into.

    Attributes:
        limits: the bounds of the buckets.
        lists: the buckets that can get rows, ascending, and the tiles of each.
        height: the number of the table's height that they come from, or None.
    """

    limits: Limits
    lists: tuple[tuple[int, Tiles], ...]
    height: int | None = None

    @property
    def plan_tiles(self) -> tuple[Tile, Tile, Tile]:
        """A tile of every bucket, whose ``rows`` cut its list; any for a bucket that gets no rows."""
        found = dict(self.lists)
        few, some, many = (found.get(bucket, self.lists[0][1]).gate_up for bucket in (FEW, SOME, MANY))
        return few, some, many

    @property
    def tall(self) -> bool:
        return any(tiles.tall for _, tiles in self.lists)


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
        heights: ascending by their averages; batches above the last one take the lists of the buckets.
        ranked_slots: slots up to which a batch is sorted in one launch by comparing each with all others.
        vector_bytes: bytes of weights up to which reading an expert once for each of its slots costs less
            than the launches of a sort; None: 2 M k up to E decides.
        dependent: True if each launch may begin before the one before it has ended, except with one token;
            needs a Hopper GPU.
        prefetch: bytes of each weight row of a program's first tile that dependent launches fetch while they
            wait, a multiple of 16, for swapped tiles where most experts have rows; 0 for none.
    """

    gate_up: tuple[Tile, Tile, Tile]
    down: tuple[Tile, Tile, Tile]
    gate_up_vector: Vector
    down_vector: Vector
    vector_tokens: int = 4
    limits: tuple[int, int] = (16, 64)
    tall: bool = False
    heights: tuple[Height, ...] = ()
    ranked_slots: int = 0
    vector_bytes: int | None = None
    dependent: bool = False
    prefetch: int = 0

    def __post_init__(self) -> None:
        averages = [height.average for height in self.heights]
        if averages != sorted(averages):
            raise ValueError(f"heights up to {averages} rows: must rise")
        if self.prefetch % 16 or self.prefetch < 0:
            raise ValueError(f"prefetch {self.prefetch}: must be a multiple of 16 bytes, or 0")
        if not 0 <= self.limits[0] <= self.limits[1]:
            raise ValueError(f"limits {self.limits}: must be two numbers of rows, rising from 0 or more")
        for bucket, (first, second) in enumerate(zip(self.gate_up, self.down, strict=True)):
            if first.rows != second.rows:
                raise ValueError(
                    f"bucket {bucket}: gate_up has tiles of {first.rows} rows and down of {second.rows}; "
                    "both read one tile list, so give them the same number"
                )

    def tiles(self, bucket: int) -> Tiles:
        """Return the tiles of a bucket's list."""
        many = bucket == MANY
        return Tiles(self.gate_up[bucket], self.down[bucket], swapped=not many, tall=self.tall and many)

    def layout(self, tokens: int, slots: int, experts: int, expected: float) -> Layout:
        """Return the lists of a batch, from its shape alone.

        Args:
            tokens: M, entries of the batch.
            slots: M k, active or not.
            experts: E, experts of this rank.
            expected: number of active slots that is expected.
        """
        for number, height in enumerate(self.heights):
            if expected / experts <= height.average:
                if height.tiles is not None:
                    return _one_list(height.tiles, number)
                break
        limits = choose_limits(self, tokens, slots, experts)
        return Layout(limits, tuple((bucket, self.tiles(bucket)) for bucket in limits.launched))

    def to_dict(self) -> dict[str, Any]:
        """Return the table as plain JSON values, which :meth:`from_dict` reads."""
        return json.loads(json.dumps(self, default=vars))  # type: ignore[no-any-return]

    @staticmethod
    def from_dict(values: dict[str, Any]) -> "Table":
        """Read what :meth:`to_dict` wrote; raise TypeError or KeyError for unknown or missing names of tiles.

        Names of the table itself that are unknown are passed over: earlier tables had others.
        """
        return Table(
            gate_up=_tiles_from_dicts(values["gate_up"]),
            down=_tiles_from_dicts(values["down"]),
            gate_up_vector=Vector(**values["gate_up_vector"]),
            down_vector=Vector(**values["down_vector"]),
            vector_tokens=int(values.get("vector_tokens", 4)),
            limits=_limits_from_list(values.get("limits", (16, 64))),
            tall=bool(values.get("tall", False)),
            heights=tuple(map(_height_from_dict, values.get("heights", ()))),
            ranked_slots=int(values.get("ranked_slots", 0)),
            vector_bytes=values.get("vector_bytes"),
            dependent=bool(values.get("dependent", False)),
            prefetch=int(values.get("prefetch", 0)),
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
        """The key of the checked-in tables: hopper, blackwell or ampere (data centre), or small (99 KiB)."""
        if self.capability[0] in (9, 10):
            return "hopper" if self.capability[0] == 9 else "blackwell"
        return "ampere" if self.capability in ((8, 0), (8, 7)) else "small"


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


def _one_list(tiles: Tiles, height: int) -> Layout:
    if tiles.swapped:
        return Layout(Limits(NO_LIMIT, NO_LIMIT), ((FEW, tiles),), height)
    return Layout(Limits(0, 0), ((MANY, tiles),), height)


def _height_from_dict(values: dict[str, Any]) -> Height:
    found = values["tiles"]
    if found is not None:
        found = Tiles(**{**found, "gate_up": Tile(**found["gate_up"]), "down": Tile(**found["down"])})
    return Height(values["average"], found)


def _tiles_from_dicts(tiles: list[dict[str, Any]]) -> tuple[Tile, Tile, Tile]:
    few, some, many = (Tile(**tile) for tile in tiles)
    return few, some, many


def _limits_from_list(rows: list[int]) -> tuple[int, int]:
    few, some = map(int, rows)
    return few, some
