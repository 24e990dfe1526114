"""A scaling study: one point after another measures while the other ranks sleep."""

import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from xpar.comm.failure import AgreedError
from xpar.comm.handshake import CollectiveError
from xpar.comm.world import World
from xpar.engine.bench.scaling.layer_source import LayerSource
from xpar.engine.bench.scaling.points import MODES, Point, compute_relative_speed
from xpar.engine.bench.timing import SETTLE_S
from xpar.engine.console.manifest import world_manifest
from xpar.engine.generation.request import Request

Result = dict[str, Any]


@dataclass(frozen=True)
class Plan:
    """The grids and sizes to measure.

    ``name``: for people. ``source``: the layer, or a request for a whole model whose ``out`` is the folder of
    the answers. ``tokens_per_rank``: in the weak mode of a layer.
    """

    name: str
    points: tuple[Point, ...]
    modes: tuple[str, ...]
    source: LayerSource | Request
    tokens_per_rank: int


class StudyStep(Protocol):
    """The thing to measure, ready on the ranks of one point."""

    def measure(self, mode: str) -> Result:
        """Measure ``mode``; collective. The result is complete on the point's first rank."""

    def manifest(self) -> dict[str, Any]:
        """Describe the point, so that a reader can repeat it."""

    def close(self) -> None:
        """Give back everything that the point holds; collective."""


Study = Callable[[World], StudyStep]
"""Makes the thing to measure ready on a world; collective. Raises AgreedError with the reason if that is
impossible."""


def run_study(
    world: World,
    points: Sequence[Point],
    study: Study,
    modes: Sequence[str] = MODES,
    keep: Callable[[Result], None] = lambda result: None,
) -> list[Result]:
    """Measure every point in every mode; collective over ``world``. The results are the same on every rank.

    A point that cannot be measured has a ``reason`` in place of figures. ``keep`` is called with each result
    as soon as it is known, on rank 0 alone.
    """
    results: list[Result] = []
    for point in points:
        found = _measure_point(world, point, study, modes)
        # The ranks outside the point wait here asleep, so that the ranks inside have the cores.
        world.comm.barrier(patient=True)
        for result in world.comm.all_gather_object(found)[0]:
            _add_relative_speed(results, result)
            if world.rank == 0:
                keep(result)
            results.append(result)
    return results


def _measure_point(world: World, point: Point, study: Study, modes: Sequence[str]) -> list[Result]:
    """Measure one point; the results are complete on rank 0, which takes part in every point."""
    inside = world.first(point.ranks)
    if inside is None:
        return []
    time.sleep(SETTLE_S)
    try:
        found = _measure_modes(inside, study, modes)
    except CollectiveError as error:
        # The ranks outside, and perhaps some inside, know nothing of the error: only the job's end ends
        # their waiting.
        raise RuntimeError(f"{point}: {error}") from error
    gc.collect()  # frees the weights of this point before those of the next are made
    inside.comm.close()
    return [{"mode": mode, "ranks": point.ranks, "nodes": point.nodes, **figures} for mode, figures in found]


def _measure_modes(inside: World, study: Study, modes: Sequence[str]) -> list[tuple[str, Result]]:
    try:
        step = study(inside)
    except AgreedError as error:
        return [(mode, {"reason": str(error), "manifest": world_manifest(inside)}) for mode in modes]
    figures = [(mode, step.measure(mode)) for mode in modes]
    manifest = step.manifest()
    step.close()
    return [(mode, {**result, "manifest": manifest}) for mode, result in figures]


def _add_relative_speed(before: Sequence[Result], result: Result) -> None:
    """Add to a measured ``result`` its speed relative to the first point of its mode."""
    if "reason" in result:
        return
    same = [r for r in before if r["mode"] == result["mode"] and "reason" not in r]
    result.update(compute_relative_speed(result, same[0] if same else result))
