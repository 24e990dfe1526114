"""Searches a tile table for some layers and batches: each part of it on its own, judged over all that use the part."""

import copy
import math
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from xpar.engine.bench.kernels.checks import require_near
from xpar.engine.bench.kernels.tile_candidates import candidates, early, parts, put
from xpar.engine.bench.kernels.timing import graph_time
from xpar.kernels.contracts import ExpertInput, ExpertSpec
from xpar.kernels.gpu.experts import TritonExperts
from xpar.kernels.gpu.tile_tables import Table

_WORTH = 0.99  # of the present time: less gained than this is noise
_THREADS = 16
_COMPILING = 0.55  # of the time that is left


@dataclass(frozen=True)
class Cell:
    """One layer with one number of tokens, and random inputs that are timed in turn."""

    name: str
    kernel: TritonExperts
    inputs: list[ExpertInput]

    def seconds(self, table: Table) -> float:
        """Per call, under ``table``."""
        other = with_table(self.kernel, table)
        return graph_time([lambda x=x: other.compute(x) for x in self.inputs], budget=0.04)  # type: ignore[misc]


@dataclass(frozen=True)
class TileTrial:
    """A table with another value in ``part``, and the cells that this concerns."""

    part: str
    value: Any
    table: Table
    cells: tuple[Cell, ...]


@dataclass(frozen=True)
class Result:
    """``ratios``: time relative to the table searched from, by the cell's name; ``mean``: their geometric mean."""

    trial: TileTrial
    ratios: dict[str, float]

    @property
    def mean(self) -> float:
        return math.exp(sum(map(math.log, self.ratios.values())) / len(self.ratios))


def parts_of(cells: list[Cell]) -> dict[str, tuple[Cell, ...]]:
    """Every part of the table that some cell uses, and the cells that do."""
    users: dict[str, list[Cell]] = {}
    for cell in cells:
        for part in parts(cell.kernel, cell.inputs[0]):
            users.setdefault(part, []).append(cell)
    return {part: tuple(its) for part, its in sorted(users.items())}


def trials(cells: list[Cell], limit: int, first: bool) -> list[TileTrial]:
    """Up to ``limit`` values for every part that some cell uses, of those to be chosen first or of the others.

    In rounds over the parts, so that a deadline takes the least likely values of each.
    """
    rounds: list[tuple[int, TileTrial]] = []
    for part, its in parts_of(cells).items():
        if early(part) == first:
            for place, value in enumerate(candidates(its[0].kernel, part, limit)):
                rounds.append((place, TileTrial(part, value, put(its[0].kernel.table, part, value), its)))
    return [trial for _, trial in sorted(rounds, key=lambda pair: pair[0])]


def search(cells: list[Cell], limit: int, note: Callable[[str], None], deadline: float) -> dict[str, Any]:
    """The table made of the best value of each part, if it is faster, else the present one; plain values.

    Where rows go is chosen first, then tiles for that; all cells start from one table. ``deadline``: a
    ``time.perf_counter()``; nothing new is timed after it. A trial that does not compile, does not fit the machine
    or computes anything else than the present table is noted and left out.
    """
    start = best = cells[0].kernel.table
    expected = {cell.name: cell.kernel.compute(cell.inputs[0]).double() for cell in cells}
    base = {cell.name: cell.seconds(start) for cell in cells}
    note(", ".join(f"{name} {s * 1e6:.1f} us" for name, s in base.items()))
    measured: list[Result] = []
    for first in (True, False):
        now = [replace(cell, kernel=with_table(cell.kernel, best)) for cell in cells]
        remaining = deadline - time.perf_counter()
        sound = _sound(trials(now, limit, first), expected, note, deadline - (1 - _COMPILING) * remaining)
        present = {cell.name: cell.seconds(best) for cell in now}
        results = _measure(sound, present, note, deadline)
        measured += results
        best = _improved(best, results, note)
    for cell in cells:
        got = with_table(cell.kernel, best).compute(cell.inputs[0])
        require_near(got, expected[cell.name], cell.kernel.spec.dtype, f"{cell.name} under the new table")
    ratios = {cell.name: cell.seconds(best) / cell.seconds(start) for cell in cells}
    mean = math.exp(sum(map(math.log, ratios.values())) / len(ratios))
    note(f"together: {mean:.3f} of the first table's time ({_listed(ratios)})")
    return {
        "seconds": base,
        "ratios": ratios,
        "table": (best if mean < _WORTH else start).to_dict(),
        "measured": [{"part": r.trial.part, "value": _plain(r.trial.value), **r.ratios} for r in measured],
    }


def _improved(table: Table, results: list[Result], note: Callable[[str], None]) -> Table:
    """``table`` with the best value of each part that is worth it; a line or more about each part."""
    for part in sorted({r.trial.part for r in results}):
        its = [r for r in results if r.trial.part == part]
        winner = min(its, key=lambda r: r.mean)
        note(_winners(part, its))
        if winner.mean < _WORTH:
            table = put(table, part, winner.trial.value)
    return table


def with_table(kernel: TritonExperts, table: Table) -> TritonExperts:
    """The same weights under another table."""
    other = copy.copy(kernel)
    other.table = table
    return other


def _sound(
    found: list[TileTrial], expected: dict[str, Tensor], note: Callable[[str], None], deadline: float
) -> list[TileTrial]:
    """The trials that compile and compute the same for all their cells.

    Compiling is most of a search, and most of it happens outside the interpreter lock.
    """

    def reason(unit: tuple[TileTrial, list[Cell]]) -> str | None:
        trial, same_code = unit
        try:
            for cell in same_code:
                if time.perf_counter() > deadline:
                    return "late"
                got = with_table(cell.kernel, trial.table).compute(cell.inputs[0])
                require_near(got, expected[cell.name], cell.kernel.spec.dtype, cell.name)
        except Exception as why:  # noqa: BLE001 - one configuration must not end the search
            return repr(why)[:200]
        return None

    units = [(trial, same) for trial in found for same in _by_code(trial.cells)]
    with ThreadPoolExecutor(_THREADS) as pool:
        reasons = list(pool.map(reason, units))
    torch.cuda.synchronize()
    bad = {id(trial): why for (trial, _), why in zip(units, reasons, strict=True) if why is not None}
    for trial in found:
        if bad.get(id(trial), "late") != "late":
            note(f"  left out: {trial.part} {_plain(trial.value)}: {bad[id(trial)]}")
    late = sum(why == "late" for why in bad.values())
    if late:
        note(f"  {late} of {len(found)} trials came too late to be compiled")
    return [trial for trial in found if id(trial) not in bad]


def _measure(
    sound: list[TileTrial], base: dict[str, float], note: Callable[[str], None], deadline: float
) -> list[Result]:
    results: list[Result] = []
    for trial in sound:
        if time.perf_counter() > deadline:
            note(f"  {len(sound) - len(results)} of {len(sound)} trials came too late to be timed")
            break
        try:
            ratios = {cell.name: cell.seconds(trial.table) / base[cell.name] for cell in trial.cells}
        except Exception as why:  # noqa: BLE001 - one configuration must not end the search
            note(f"  left out: {trial.part} {_plain(trial.value)}: {why!r}"[:300])
            continue
        results.append(Result(trial, ratios))
    return results


def _by_code(cells: tuple[Cell, ...]) -> list[list[Cell]]:
    """Cells that run the same compiled kernels together: two threads at once would compile them twice."""
    groups: dict[ExpertSpec, list[Cell]] = {}
    for cell in cells:
        groups.setdefault(cell.kernel.spec, []).append(cell)
    return list(groups.values())


def _winners(part: str, results: list[Result]) -> str:
    """The best of all cells together, then each cell's own, then all values of what has few."""
    best = min(results, key=lambda r: r.mean)
    lines = [f"{part}: {best.mean:.3f} {_plain(best.trial.value)} ({_listed(best.ratios)})"]
    for name in best.ratios:
        own = min(results, key=lambda r: r.ratios[name])
        if own is not best:
            lines.append(f"    {name}: {own.ratios[name]:.3f} {_plain(own.trial.value)}")
    for r in sorted(results, key=lambda r: r.mean):
        if r is not best and early(part):
            lines.append(f"    {r.mean:.3f} {_plain(r.trial.value)} ({_listed(r.ratios)})")
    return "\n".join(lines)


def _listed(ratios: dict[str, float]) -> str:
    return ", ".join(f"{name} {ratio:.3f}" for name, ratio in ratios.items())


def _plain(value: Any) -> Any:
    return value if isinstance(value, tuple | bool) else asdict(value)
