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

from xpar.engine.kernel_bench.candidates import candidates, early, parts, put
from xpar.engine.kernel_bench.checks import require_near
from xpar.engine.kernel_bench.timing import graph_time
from xpar.kernels.contracts import ExpertInput
from xpar.kernels.gpu.experts import TritonExperts
from xpar.kernels.gpu.tiles import Table

_WORTH = 0.99  # of the present time: less gained than this is noise
_THREADS = 16


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
class Trial:
    """A table with another value in ``part``, and the cells that this concerns."""

    part: str
    value: Any
    table: Table
    cells: tuple[Cell, ...]


@dataclass(frozen=True)
class Result:
    """``ratios``: time relative to the table searched from, by the cell's name; ``mean``: their geometric mean."""

    trial: Trial
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


def trials(cells: list[Cell], limit: int, first: bool) -> list[Trial]:
    """Up to ``limit`` values for every part that some cell uses, of those to be chosen first or of the others."""
    return [
        Trial(part, value, put(its[0].kernel.table, part, value), its)
        for part, its in parts_of(cells).items()
        if early(part) == first
        for value in candidates(its[0].kernel, part, limit)
    ]


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
        sound = _sound(trials(now, limit, first), expected, note, deadline)
        present = {cell.name: cell.seconds(best) for cell in now}
        results = _measure(sound, present, note, deadline)
        measured += results
        best = _improved(best, results, note)
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
    found: list[Trial], expected: dict[str, Tensor], note: Callable[[str], None], deadline: float
) -> list[Trial]:
    """The trials that compile and compute the same for all their cells.

    Compiling is most of a search, and most of it happens outside the interpreter lock.
    """

    def reason(pair: tuple[Trial, Cell]) -> str | None:
        trial, cell = pair
        if time.perf_counter() > deadline:
            return "late"
        try:
            got = with_table(cell.kernel, trial.table).compute(cell.inputs[0])
            require_near(got, expected[cell.name], cell.kernel.spec.dtype, cell.name)
        except Exception as why:  # noqa: BLE001 - one configuration must not end the search
            return f"{cell.name}: {why!r}"[:200]
        return None

    pairs = [(trial, cell) for trial in found for cell in trial.cells]
    with ThreadPoolExecutor(_THREADS) as pool:
        reasons = list(pool.map(reason, pairs))
    torch.cuda.synchronize()
    bad = {id(trial): why for (trial, _), why in zip(pairs, reasons, strict=True) if why is not None}
    for trial in found:
        if bad.get(id(trial), "late") != "late":
            note(f"  left out: {trial.part} {_plain(trial.value)}: {bad[id(trial)]}")
    late = sum(why == "late" for why in bad.values())
    if late:
        note(f"  {late} of {len(found)} trials came too late to be compiled")
    return [trial for trial in found if id(trial) not in bad]


def _measure(
    sound: list[Trial], base: dict[str, float], note: Callable[[str], None], deadline: float
) -> list[Result]:
    """Times in rounds over the parts, so that a deadline takes the least likely values of each."""
    by_part: dict[str, list[Trial]] = {}
    for trial in sound:
        by_part.setdefault(trial.part, []).append(trial)
    ordered = sorted(sound, key=lambda trial: by_part[trial.part].index(trial))
    results: list[Result] = []
    for trial in ordered:
        if time.perf_counter() > deadline:
            note(f"  {len(ordered) - len(results)} of {len(ordered)} trials came too late to be timed")
            break
        ratios = {cell.name: cell.seconds(trial.table) / base[cell.name] for cell in trial.cells}
        results.append(Result(trial, ratios))
    return results


def _winners(part: str, results: list[Result]) -> str:
    """One line for the best of all cells together, one for each cell's own."""
    best = min(results, key=lambda r: r.mean)
    lines = [f"{part}: {best.mean:.3f} {_plain(best.trial.value)} ({_listed(best.ratios)})"]
    for name in best.ratios:
        own = min(results, key=lambda r: r.ratios[name])
        if own is not best:
            lines.append(f"    {name}: {own.ratios[name]:.3f} {_plain(own.trial.value)}")
    return "\n".join(lines)


def _listed(ratios: dict[str, float]) -> str:
    return ", ".join(f"{name} {ratio:.3f}" for name, ratio in ratios.items())


def _plain(value: Any) -> Any:
    return value if isinstance(value, tuple) else asdict(value)
