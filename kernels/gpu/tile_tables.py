"""Tile shapes and launch parameters of the expert products, per bucket of tokens per expert. Plain data.

Buckets: ``FEW`` (by default up to 16 rows of an expert), ``SOME`` (up to 64), ``MANY`` (more). In the first two the weight tile
is the tall operand of the matrix unit and the tokens are its narrow side, so that a tile of 16 tokens wastes nothing;
in the third it is the other way round.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

FEW, SOME, MANY = range(3)
NO_LIMIT = 2**31 - 1


@dataclass(frozen=True)
class Limits:
    """Which list of tiles an expert's rows are on; the device applies it to the counts that it finds.

    ``few``, ``some``: most rows of an expert in FEW and in SOME; the others are in MANY.
    """

    few: int
    some: int

    @property
    def launched(self) -> tuple[int, ...]:
        """The buckets that can get tiles."""
        many = max(self.few, self.some) < NO_LIMIT
        used = (self.few > 0, self.some > self.few, many)
        return tuple(bucket for bucket in (FEW, SOME, MANY) if used[bucket])


@dataclass(frozen=True)
class Tile:
    """One product's tile and launch.

    ``rows`` token rows by ``columns`` weight rows (of the gate and again of the up half in a gated gate-up), ``depth``
    of the sum at a time. ``stages``: copies in flight. ``per_sm``: programs per multiprocessor. ``group``: tiles of
    token rows that are walked together for each block of columns. ``flatten``: the next tile's copies start
    before this one's result is stored.
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
    """A product with one token on scalar units: ``columns`` weight rows by ``depth`` at a time in a program."""

    columns: int
    depth: int
    stages: int
    warps: int


@dataclass(frozen=True)
class Table:
    """All launch parameters of a layer. ``gate_up`` and ``down``: a tile per bucket, with equal ``rows``.

    ``vector_tokens``: batches of up to this many tokens go through ``gate_up_vector`` and ``down_vector``. ``limits``:
    see :class:`Limits`, of which :func:`limits_of` leaves out what a batch does not need. ``tall``: the last tile of an
    expert with many rows takes up to half a tile on top, where the expert has no more than those.
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
        """Plain JSON values; :meth:`from_dict` reads them."""
        return json.loads(json.dumps(self, default=vars))  # type: ignore[no-any-return]

    @staticmethod
    def from_dict(values: dict[str, Any]) -> "Table":
        """The inverse of :meth:`to_dict`; raises TypeError or KeyError on unknown or missing names."""
        return Table(
            gate_up=_three(values["gate_up"]),
            down=_three(values["down"]),
            gate_up_vector=Vector(**values["gate_up_vector"]),
            down_vector=Vector(**values["down_vector"]),
            vector_tokens=int(values.get("vector_tokens", 4)),
            limits=_two(values.get("limits", (16, 64))),
            tall=bool(values.get("tall", False)),
        )


@dataclass(frozen=True)
class Machine:
    """What the parameters depend on: multiprocessors and compute capability."""

    sms: int
    capability: tuple[int, int]

    @staticmethod
    def of(device: str | torch.device) -> "Machine":
        """The machine behind a torch device ``cuda`` or ``cuda:N``."""
        found = torch.cuda.get_device_properties(device)
        return Machine(found.multi_processor_count, (found.major, found.minor))

    @property
    def family(self) -> str:
        """``hopper``, ``blackwell`` (data centre), ``ampere`` (likewise), or ``small``: 99 KiB of shared memory."""
        if self.capability[0] in (9, 10):
            return "hopper" if self.capability[0] == 9 else "blackwell"
        return "ampere" if self.capability in ((8, 0), (8, 7)) else "small"


_SCALAR = Vector(columns=8, depth=512, stages=2, warps=4)
_SCALAR_DOWN = Vector(columns=4, depth=512, stages=3, warps=4)
# Measured on an H200, one token of OLMoE and Qwen3-30B layers: 5 to 9 % faster than the two above.
_HOPPER = Vector(columns=2, depth=2048, stages=3, warps=8)
_HOPPER_DOWN = Vector(columns=4, depth=1024, stages=3, warps=4)
# Keys: architecture, bytes per element. MANY of hopper is the fastest of 21 measured on an H200; the rest comes from
# register and shared-memory counts of compiled kernels: none spills, but tall tiles with a bias or a long activation do,
# up to 88 bytes a thread, once a tile; gpt-oss has both, and was 7 % faster with them.
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
# float32 goes through scalar units (IEEE products), where a thread's registers bound the tile; one table for all.
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
    """The checked-in parameters for ``dtype`` on ``machine``."""
    return _FLOAT32 if dtype.itemsize == 4 else TABLES[machine.family, dtype.itemsize]


def read_table(path: Path, machine: Machine, dtype: torch.dtype) -> Table | None:
    """The row of a measured file (JSON: a list of ``{"sms", "capability", "itemsize", "table"}``) for this machine.

    None if the file has no such row. Raises ValueError, naming the file, where a row is malformed.
    """
    for row in json.loads(path.read_text()):
        try:
            key = (int(row["sms"]), tuple(row["capability"]), int(row["itemsize"]))
            if key == (machine.sms, machine.capability, dtype.itemsize):
                return Table.from_dict(row["table"])
        except (KeyError, TypeError, ValueError) as why:
            raise ValueError(f"{path}: a row is no tile table ({why!r}); measure it again") from why
    return None


def write_table(path: Path, machine: Machine, dtype: torch.dtype, table: Table) -> None:
    """Put ``table`` into the file that :func:`read_table` reads, in place of this machine's row; others stay."""
    key = {"sms": machine.sms, "capability": list(machine.capability), "itemsize": dtype.itemsize}
    rows = json.loads(path.read_text()) if path.exists() else []
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{path}: not a file of tile tables; name another one")
    kept = [row for row in rows if {name: row.get(name) for name in key} != key]
    path.write_text(json.dumps([*kept, {**key, "table": table.to_dict()}], indent=1) + "\n")


def limits_of(table: Table, tokens: int, slots: int, experts: int) -> Limits:
    """Where the rows of a batch go; known from its shape alone.

    An unused bucket is left out, and with it its launches, by equal or unreachable limits: an expert that gets more
    rows than foreseen is computed in several tiles of the largest bucket there is.
    """
    few, some = table.limits
    average = slots / experts
    many = tokens > some and 8 * average >= 3 * some
    return Limits(
        few=NO_LIMIT if tokens <= few else few if average < 4 * few else 0,
        some=some if many else NO_LIMIT,
    )


def _three(tiles: list[dict[str, Any]]) -> tuple[Tile, Tile, Tile]:
    few, some, many = (Tile(**tile) for tile in tiles)
    return few, some, many


def _two(rows: list[int]) -> tuple[int, int]:
    few, some = map(int, rows)
    return few, some
