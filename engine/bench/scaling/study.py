"""Point after point: its ranks measure, the others sleep, and what was found is kept before the next one begins."""

import gc
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from xpar.comm.failure import AgreedError
from xpar.comm.handshake import CollectiveError
from xpar.comm.world import World
from xpar.engine.bench.scaling.points import MODES, Point, relative
from xpar.engine.bench.timing import SETTLE_S
from xpar.engine.console.report import surroundings

Record = dict[str, Any]


class StudyStep(Protocol):
    """What is measured, ready on the ranks of one point."""

    def measure(self, mode: str) -> Record:
        """The figures of ``mode``; collective over the point's ranks. Complete on their first rank."""

    def manifest(self) -> dict[str, Any]:
        """What a reader needs to repeat the point."""

    def close(self) -> None:
        """Give everything back; collective."""


Study = Callable[[World], StudyStep]
"""Makes it ready on a world, collective over it; AgreedError, with the reason, where that cannot be."""


def sweep(
    world: World,
    points: Sequence[Point],
    study: Study,
    modes: Sequence[str] = MODES,
    keep: Callable[[Record], None] = lambda record: None,
) -> list[Record]:
    """A record for every mode and point, in ascending order of points; collective over ``world``.

    A point that cannot be measured has a ``reason`` in place of figures. ``keep`` hears each record, on rank 0 only. All
    ranks return the same.
    """
    records: list[Record] = []
    for point in points:
        found = _at(world, point, study, modes)
        # The ranks outside the point wait here; asleep, so that those inside have the cores.
        world.comm.barrier(patient=True)
        for record in world.comm.all_gather_object(found)[0]:
            _compare(records, record)
            if world.rank == 0:
                keep(record)
            records.append(record)
    return records


def _at(world: World, point: Point, study: Study, modes: Sequence[str]) -> list[Record]:
    """The records of one point, complete on rank 0, which takes part in all of them."""
    inside = world.first(point.ranks)
    if inside is None:
        return []
    time.sleep(SETTLE_S)
    try:
        found = _measured(inside, study, modes)
    except CollectiveError as error:
        # The ranks outside, and perhaps some inside, know nothing of it: only what ends the job ends their waiting.
        raise RuntimeError(f"{point}: {error}") from error
    gc.collect()  # weights go before those of the next point come
    inside.comm.close()
    return [{"mode": mode, "ranks": point.ranks, "nodes": point.nodes, **figures} for mode, figures in found]


def _measured(inside: World, study: Study, modes: Sequence[str]) -> list[tuple[str, Record]]:
    try:
        station = study(inside)
    except AgreedError as why:
        return [(mode, {"reason": str(why), "manifest": surroundings(inside)}) for mode in modes]
    figures = [(mode, station.measure(mode)) for mode in modes]
    manifest = station.manifest()
    station.close()
    return [(mode, {**record, "manifest": manifest}) for mode, record in figures]


def _compare(before: Sequence[Record], record: Record) -> None:
    """Give a measured ``record`` its speed relative to the first of its mode, which is the smallest."""
    if "reason" in record:
        return
    same = [r for r in before if r["mode"] == record["mode"] and "reason" not in r]
    record.update(relative(record, same[0] if same else record))
