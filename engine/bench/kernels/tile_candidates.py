"""The values to try for each part of a tile table: neighbours first, then any that fit.

A part is a field of the table (``limits``, ``tall``, ``vector_bytes``) or ``form`` and a height's
number, which decide where rows go. Or it is ``dependent``; or a stage and a bucket of rows or a height, such
as ``down 2``, ``gate_up vector`` or ``down height3``.
"""

import itertools
import random
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from xpar.kernels.contracts import ExpertInput
from xpar.kernels.gpu.experts import TritonExperts
from xpar.kernels.gpu.tile_tables import FEW, MANY, SOME, VECTOR_BYTES, Table, Tile, Tiles, Vector

STAGES = ("gate_up", "down")
Value = Tile | Vector | Tiles | tuple[int, int] | bool | int | None
"""The value of one part."""
_LIMITS = (
    (16, 128), (0, 64), (16, 256), (32, 128), (0, 128), (32, 64), (0, 256), (16, 32), (0, 0),
    (16, 16), (64, 128),
)  # fmt: skip
_VECTOR_BYTES = (0, VECTOR_BYTES, 1 << 40)  # never, by the bytes of an expert, always
_FIELD_PARTS = ("limits", "tall", "vector_bytes", "dependent")
_SHARED = 225 << 10  # bytes of shared memory of a multiprocessor that its programs may use together
_FIELDS: dict[str, tuple[Any, ...]] = {
    "columns": (64, 128, 256),
    "depth": (32, 64, 128, 256),
    "stages": (2, 3, 4, 5, 6),
    "warps": (4, 8),
    "per_sm": (1, 2, 3, 4),
    "group": (1, 4, 8, 16),
    "flatten": (False, True),
}
_VECTOR_FIELDS: dict[str, tuple[Any, ...]] = {
    "columns": (1, 2, 4, 8, 16),
    "depth": (256, 512, 1024, 2048),
    "stages": (1, 2, 3, 4),
    "warps": (2, 4, 8),
}


def parts(kernel: TritonExperts, x: ExpertInput) -> tuple[str, ...]:
    """Name the parts of the kernel's table that a batch like ``x`` is computed with."""
    tokens, slots = x.topk_ids.shape[0], x.topk_ids.numel()
    dependent = ("dependent",) if kernel.machine.family == "hopper" else ()
    few = ("vector_bytes",) if 1 < tokens <= kernel.table.vector_tokens else ()
    if kernel.is_tiny(x):
        return (*few, *dependent, *(f"{stage} vector" for stage in STAGES))
    layout = kernel.layout(tokens, slots)
    if layout.height is not None:
        which = f"height{layout.height}"
        return (*few, f"form {which}", *dependent, *(f"{stage} {which}" for stage in STAGES))
    buckets = layout.limits.launched
    tall = ("tall",) if MANY in buckets else ()
    tiles = (f"{stage} {bucket}" for bucket in buckets for stage in STAGES)
    return (*few, "limits", *tall, *dependent, *tiles)


def is_early(part: str) -> bool:
    """Return whether ``part`` must be chosen before the tiles, because it decides where rows go."""
    return part in ("limits", "tall", "vector_bytes") or part.startswith("form")


def get_value(table: Table, part: str) -> Value:
    """Return the value of ``part`` in ``table``."""
    if part in _FIELD_PARTS:
        return getattr(table, part)  # type: ignore[no-any-return]
    stage, which = part.split()
    if which.startswith("height"):
        tiles = table.heights[_number(which)].tiles
        return tiles if stage == "form" else getattr(tiles, stage)
    value: Tile | Vector = (
        getattr(table, f"{stage}_vector") if which == "vector" else getattr(table, stage)[int(which)]
    )
    return value


def replace_value(table: Table, part: str, value: Value) -> Table:
    """Return a copy of ``table`` with ``value`` in ``part``."""
    if part in _FIELD_PARTS:
        return replace(table, **{part: value})  # type: ignore[arg-type]
    stage, which = part.split()
    if which.startswith("height"):
        heights, number = list(table.heights), _number(which)
        if stage != "form":
            value = replace(heights[number].tiles, **{stage: value})  # type: ignore[type-var]
        heights[number] = replace(heights[number], tiles=value)  # type: ignore[arg-type]
        return replace(table, heights=tuple(heights))
    if which == "vector":
        return replace(table, **{f"{stage}_vector": value})  # type: ignore[arg-type]
    tiles = list(getattr(table, stage))
    tiles[int(which)] = value
    return replace(table, **{stage: tuple(tiles)})  # type: ignore[arg-type]


def candidates(kernel: TritonExperts, part: str, limit: int) -> list[Value]:
    """Return up to ``limit`` new values for ``part``, the most likely first."""
    present = get_value(kernel.table, part)
    if part.startswith("form"):
        return _other_forms(kernel.table, _number(part.split()[1]))[:limit]
    if part in ("limits", "vector_bytes"):
        values: tuple[Value, ...] = _LIMITS if part == "limits" else _VECTOR_BYTES
        return [value for value in values if value != present][:limit]
    if isinstance(present, bool):
        return [not present]
    assert isinstance(present, Tile | Vector)
    fields = _VECTOR_FIELDS if isinstance(present, Vector) else _FIELDS
    near: list[Value] = [v for v in _neighbours(present, fields) if _fits(kernel, part, v)]
    if len(near) >= limit:
        return near[:limit]
    far = [
        v for v in _combinations(present, fields) if v != present and v not in near and _fits(kernel, part, v)
    ]
    return near + random.Random(0).sample(far, min(limit - len(near), len(far)))


def _other_forms(table: Table, number: int) -> list[Value]:
    """Return other ways for the batches of a height: the neighbours' tiles, other rows, the lists."""
    tiles = [height.tiles for height in table.heights]
    present = tiles[number]
    found: list[Value] = [*reversed(tiles[:number][-1:]), *tiles[number + 1 :][:1]]
    if present is not None and not present.swapped:
        found += [replace(present, tall=False, gathered=not present.gathered)]
        found += [] if present.gathered else [replace(present, tall=not present.tall)]
    return [value for value in dict.fromkeys([*found, None]) if value != present]


def _bucket(table: Table, which: str) -> int:
    """Return the bucket whose kernels compute ``which``, a bucket or a height."""
    if not which.startswith("height"):
        return int(which)
    tiles = table.heights[_number(which)].tiles
    if tiles is None or not tiles.swapped:
        return MANY
    return FEW if tiles.gate_up.rows <= 16 else SOME


def _number(which: str) -> int:
    return int(which.removeprefix("height"))


def _neighbours(present: Tile | Vector, fields: dict[str, tuple[Any, ...]]) -> Iterator[Tile | Vector]:
    """Yield values with one field changed to a neighbouring value, the nearest first."""
    for step in (1, -1, 2, -2):
        for name, values in fields.items():
            at = values.index(getattr(present, name)) + step if getattr(present, name) in values else -1
            if 0 <= at < len(values):
                yield replace(present, **{name: values[at]})


def _combinations(present: Tile | Vector, fields: dict[str, tuple[Any, ...]]) -> Iterator[Tile | Vector]:
    """Yield every combination of values of ``fields``."""
    for chosen in itertools.product(*fields.values()):
        yield replace(present, **dict(zip(fields, chosen, strict=True)))


def _fits(kernel: TritonExperts, part: str, value: Tile | Vector) -> bool:
    """Return whether ``value`` fits registers and shared memory, roughly, and loads enough at a time."""
    stage, which = part.split()
    if isinstance(value, Vector):
        return 8 <= value.columns * value.depth // (32 * value.warps) <= 64
    bucket = _bucket(kernel.table, which)
    tall = kernel.table.tall
    if which.startswith("height"):
        tiles = kernel.table.heights[_number(which)].tiles
        tall = tiles is not None and tiles.tall
    halves = 2 if stage == "gate_up" and kernel.spec.activation.gated else 1
    wide = halves * value.columns
    rows = value.rows * 3 // 2 if bucket == MANY and tall else value.rows
    used = value.stages * (rows + wide) * value.depth * kernel.spec.dtype.itemsize * value.per_sm
    if not _SHARED // 4 <= used <= _SHARED or value.rows * wide / (32 * value.warps) > 128:
        return False
    if bucket == FEW and value.group > 1:
        return False  # its experts have one tile of rows
    return value.depth <= 128 if bucket == MANY else value.columns <= 128
