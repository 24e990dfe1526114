"""Tries tile shapes for one layer and batch: each product of each bucket on its own, the rest as it is."""

import copy
import itertools
import random
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from xpar.engine.kernel_bench.timing import graph_time
from xpar.kernels.contracts import ExpertInput
from xpar.kernels.gpu.experts import TritonExperts
from xpar.kernels.gpu.tiles import FEW, MANY, Table, Tile, Vector, bucket_limits, launched

Stage = Literal["gate_up", "down"]
STAGES: tuple[Stage, Stage] = ("gate_up", "down")
_SHARED = 225 << 10  # bytes of a multiprocessor that its programs may use together


@dataclass(frozen=True)
class Trial:
    """One change to a table: ``what`` was changed (stage, bucket), to which parameters."""

    what: str
    parameters: Tile | Vector
    table: Table


def trials(kernel: TritonExperts, x: ExpertInput, limit: int) -> Iterator[Trial]:
    """Up to ``limit`` changes for each product that ``x`` needs."""
    tokens, top_k = x.topk_ids.shape
    table, pick = kernel.table, random.Random(0)
    if kernel.is_tiny(x):
        for stage in STAGES:
            field = f"{stage}_vector"
            for vector in _some(list(_vectors()), limit, pick):
                yield Trial(field, vector, replace(table, **{field: vector}))
        return
    for bucket in launched(bucket_limits(tokens, tokens * top_k, kernel.spec.num_experts)):
        for stage in STAGES:
            halves = 2 if stage == "gate_up" and kernel.spec.activation.gated else 1
            tiles = list(getattr(table, stage))
            candidates = list(_tiles(tiles[bucket], bucket, halves, kernel.spec.dtype.itemsize))
            for tile in _some(candidates, limit, pick):
                changed = (*tiles[:bucket], tile, *tiles[bucket + 1 :])
                yield Trial(f"{stage} {bucket}", tile, replace(table, **{stage: changed}))  # type: ignore[arg-type]


def sweep(
    kernel: TritonExperts, inputs: list[ExpertInput], limit: int, note: Callable[[str], None]
) -> dict[str, Any]:
    """Seconds per call of the table as it is and of each trial; the best trial of each product. Plain values.

    A trial that does not compile, or does not fit the machine, is noted and left out.
    """
    found = list(trials(kernel, inputs[0], limit))
    with ThreadPoolExecutor(
        12
    ) as pool:  # compiling is most of the time, and happens outside the interpreter lock
        errors = list(pool.map(lambda trial: _first_call(kernel, trial, inputs[0]), found))
    base = _time(kernel, kernel.table, inputs)
    best: dict[str, dict[str, Any]] = {}
    measured = []
    for trial, error in zip(found, errors, strict=True):
        if error is None:
            try:
                seconds = _time(kernel, trial.table, inputs)
            except Exception as why:  # noqa: BLE001 - one configuration must not end the sweep
                error = repr(why)[:200]
        if error is not None:
            note(f"  {trial.what} {trial.parameters}: {error}")
            continue
        row = {"seconds": seconds, **asdict(trial.parameters)}
        measured.append({"what": trial.what, **row})
        if seconds < best.get(trial.what, {"seconds": base})["seconds"]:
            best[trial.what] = row
    for what, row in best.items():
        note(f"  {what}: {row['seconds'] * 1e6:.1f} us against {base * 1e6:.1f}: {row}")
    return {"seconds": base, "best": best, "measured": measured}


def _tiles(base: Tile, bucket: int, halves: int, itemsize: int) -> Iterator[Tile]:
    """Shapes that fit in shared memory and, by a rough count, in registers."""
    columns = (64, 128, 256) if bucket == MANY else (64, 128)
    depths = (64, 128) if bucket == MANY else (64, 128, 256)
    options = itertools.product(
        columns, depths, (2, 3, 4, 5, 6), (4, 8), (1, 2, 3, 4), (1, 4, 8, 16), (False, True)
    )
    for n, k, stages, warps, per_sm, group, flatten in options:
        bytes_used = stages * (base.rows + halves * n) * k * itemsize * per_sm
        registers = base.rows * n * halves / (32 * warps)
        if not _SHARED // 4 <= bytes_used <= _SHARED or registers > 128 or (bucket == FEW and group > 1):
            continue
        yield replace(
            base, columns=n, depth=k, stages=stages, warps=warps, per_sm=per_sm, group=group, flatten=flatten
        )


def _vectors() -> Iterator[Vector]:
    for columns, depth, stages, warps in itertools.product(
        (1, 2, 4, 8, 16), (256, 512, 1024, 2048), (1, 2, 3, 4), (2, 4, 8)
    ):
        if 8 <= columns * depth // (32 * warps) <= 64:
            yield Vector(columns, depth, stages, warps)


def _some(candidates: list[Any], limit: int, pick: random.Random) -> list[Any]:
    return candidates if len(candidates) <= limit else pick.sample(candidates, limit)


def _with(kernel: TritonExperts, table: Table) -> TritonExperts:
    """The same weights under another table."""
    other = copy.copy(kernel)
    other.table = table
    return other


def _first_call(kernel: TritonExperts, trial: Trial, x: ExpertInput) -> str | None:
    """Compile and run once; what went wrong, or None."""
    try:
        _with(kernel, trial.table).compute(x)
    except Exception as why:  # noqa: BLE001 - one configuration must not end the sweep
        return repr(why)[:200]
    return None


def _time(kernel: TritonExperts, table: Table, inputs: list[ExpertInput]) -> float:
    other = _with(kernel, table)
    return graph_time([lambda x=x: other.compute(x) for x in inputs], budget=0.05)  # type: ignore[misc]
