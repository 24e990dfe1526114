"""The search for a tile table: each part by itself, judged over all cells (layer, tokens) that use it."""

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
from xpar.engine.bench.kernels.tile_candidates import candidates, is_early, parts, replace_value
from xpar.engine.bench.timing import graph_time
from xpar.kernels.contracts import ExpertInput, ExpertSpec
from xpar.kernels.gpu.experts import TritonExperts
from xpar.kernels.gpu.tile_tables import Table

_WORTH = 0.99  # fraction of the present time above which a gain is noise
_THREADS = 16
_COMPILING = 0.55  # fraction of the remaining time that compiling may take


@dataclass(frozen=True)
class Cell:
    """One layer with one number of tokens, and its random inputs, which are timed in turn."""

    name: str
    kernel: TritonExperts
    inputs: list[ExpertInput]

    def seconds(self, table: Table) -> float:
        """Measure the seconds per call with ``table``."""
        other = with_table(self.kernel, table)
        return graph_time([lambda x=x: other.compute(x) for x in self.inputs], budget=0.04)  # type: ignore[misc]


@dataclass(frozen=True)
class TileTrial:
    """A table with another ``value`` in ``part``, and the cells that use the part."""

    part: str
    value: Any
    table: Table
    cells: tuple[Cell, ...]


@dataclass(frozen=True)
class TileResult:
    """The times of a trial relative to the first table, by the cell's name, and their geometric ``mean``."""

    trial: TileTrial
    ratios: dict[str, float]

    @property
    def mean(self) -> float:
        return math.exp(sum(map(math.log, self.ratios.values())) / len(self.ratios))


def group_by_part(cells: list[Cell]) -> dict[str, tuple[Cell, ...]]:
    """Return every part of the table that any cell uses, with the cells that use it."""
    users: dict[str, list[Cell]] = {}
    for cell in cells:
        for part in parts(cell.kernel, cell.inputs[0]):
            users.setdefault(part, []).append(cell)
    return {part: tuple(found) for part, found in sorted(users.items())}


def make_trials(cells: list[Cell], limit: int, early: bool) -> list[TileTrial]:
    """Make up to ``limit`` trials for every part that any cell uses, in rounds over the parts.

    A deadline then leaves out the least likely values of each. ``early``: of the parts that are chosen first.
    """
    rounds: list[tuple[int, TileTrial]] = []
    for part, users in group_by_part(cells).items():
        if is_early(part) == early:
            kernel = users[0].kernel
            for place, value in enumerate(candidates(kernel, part, limit)):
                table = replace_value(kernel.table, part, value)
                rounds.append((place, TileTrial(part, value, table, users)))
    return [trial for _, trial in sorted(rounds, key=lambda pair: pair[0])]


def search(cells: list[Cell], limit: int, note: Callable[[str], None], deadline: float) -> dict[str, Any]:
    """Search the best value of each part: first where rows go, then the tiles for that.

    A trial that does not compile, does not fit the machine or changes the result is noted and left out.
    ``deadline``: value of ``time.perf_counter()`` after which nothing new is timed.

    Returns:
        As plain values: ``table``, made of the best values if it is faster, otherwise the first table; the
        ``seconds`` of each cell with the first table, their ``ratios`` with the new one, and everything that
        was ``measured``.
    """
    start = best = cells[0].kernel.table
    expected = {cell.name: cell.kernel.compute(cell.inputs[0]).double() for cell in cells}
    base = {cell.name: cell.seconds(start) for cell in cells}
    note(", ".join(f"{name} {s * 1e6:.1f} us" for name, s in base.items()))
    measured: list[TileResult] = []
    for early in (True, False):
        now = [replace(cell, kernel=with_table(cell.kernel, best)) for cell in cells]
        remaining = deadline - time.perf_counter()
        sound = _find_sound(
            make_trials(now, limit, early), expected, note, deadline - (1 - _COMPILING) * remaining
        )
        present = {cell.name: cell.seconds(best) for cell in now}
        results = _time_trials(sound, present, note, deadline)
        measured += results
        best = _improve(best, results, note)
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


def _improve(table: Table, results: list[TileResult], note: Callable[[str], None]) -> Table:
    """Return ``table`` with the best value of each part, if it is worth it; note the winners."""
    for part in sorted({r.trial.part for r in results}):
        tried = [r for r in results if r.trial.part == part]
        winner = min(tried, key=lambda r: r.mean)
        note(_format_winners(part, tried))
        if winner.mean < _WORTH:
            table = replace_value(table, part, winner.trial.value)
    return table


def with_table(kernel: TritonExperts, table: Table) -> TritonExperts:
    """Return a kernel with the same weights and another table."""
    other = copy.copy(kernel)
    other.table = table
    return other


def _find_sound(
    found: list[TileTrial], expected: dict[str, Tensor], note: Callable[[str], None], deadline: float
) -> list[TileTrial]:
    """Return the trials that compile (in threads: most of a search) and keep all results."""

    def find_fault(unit: tuple[TileTrial, list[Cell]]) -> str | None:
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

    units = [(trial, same) for trial in found for same in _group_by_code(trial.cells)]
    with ThreadPoolExecutor(_THREADS) as pool:
        reasons = list(pool.map(find_fault, units))
    torch.cuda.synchronize()
    bad = {id(trial): why for (trial, _), why in zip(units, reasons, strict=True) if why is not None}
    for trial in found:
        if bad.get(id(trial), "late") != "late":
            note(f"  left out: {trial.part} {_plain(trial.value)}: {bad[id(trial)]}")
    late = sum(why == "late" for why in bad.values())
    if late:
        note(f"  {late} of {len(found)} trials came too late to be compiled")
    return [trial for trial in found if id(trial) not in bad]


def _time_trials(
    sound: list[TileTrial], base: dict[str, float], note: Callable[[str], None], deadline: float
) -> list[TileResult]:
    """Time the trials relative to the seconds ``base`` of each cell, until ``deadline``."""
    results: list[TileResult] = []
    for trial in sound:
        if time.perf_counter() > deadline:
            note(f"  {len(sound) - len(results)} of {len(sound)} trials came too late to be timed")
            break
        try:
            ratios = {cell.name: cell.seconds(trial.table) / base[cell.name] for cell in trial.cells}
        except Exception as why:  # noqa: BLE001 - one configuration must not end the search
            note(f"  left out: {trial.part} {_plain(trial.value)}: {why!r}"[:300])
            continue
        results.append(TileResult(trial, ratios))
    return results


def _group_by_code(cells: tuple[Cell, ...]) -> list[list[Cell]]:
    """Group cells that run the same compiled kernels: two threads would compile them twice."""
    groups: dict[ExpertSpec, list[Cell]] = {}
    for cell in cells:
        groups.setdefault(cell.kernel.spec, []).append(cell)
    return list(groups.values())


def _format_winners(part: str, results: list[TileResult]) -> str:
    """Format the best value over all cells, of each cell, and all values of an early part."""
    best = min(results, key=lambda r: r.mean)
    lines = [f"{part}: {best.mean:.3f} {_plain(best.trial.value)} ({_listed(best.ratios)})"]
    for name in best.ratios:
        own = min(results, key=lambda r: r.ratios[name])
        if own is not best:
            lines.append(f"    {name}: {own.ratios[name]:.3f} {_plain(own.trial.value)}")
    for r in sorted(results, key=lambda r: r.mean):
        if r is not best and is_early(part):
            lines.append(f"    {r.mean:.3f} {_plain(r.trial.value)} ({_listed(r.ratios)})")
    return "\n".join(lines)


def _listed(ratios: dict[str, float]) -> str:
    return ", ".join(f"{name} {ratio:.3f}" for name, ratio in ratios.items())


def _plain(value: Any) -> Any:
    return value if value is None or isinstance(value, tuple | int) else asdict(value)
