"""Measures what the watch over collectives costs while nothing is wrong.

Run it with ``mpirun -n 2 python benchmarks/guard_cost.py``.
"""

import sys
import time
from array import array
from collections.abc import Callable

from mpi4py import MPI

from xpar.comm.watchdog.deadlines import Deadlines
from xpar.comm.world import World

ROUNDS, CALLS = 40, 500


def microseconds(call: Callable[[], None]) -> float:
    begin = time.perf_counter()
    for _ in range(CALLS):
        call()
    return (time.perf_counter() - begin) / CALLS * 1e6


def main() -> None:
    plain = World.attach(MPI.COMM_WORLD.Dup()).comm
    watched = World.attach(MPI.COMM_WORLD.Dup(), deadlines=Deadlines())
    if watched.watchdog is None:
        raise SystemExit("start at least 2 ranks: mpirun -n 2 …")
    journal = watched.watchdog.journal("measured", [watched.rank])

    def note() -> None:
        journal.enter(journal.next_seq(), "all_to_all_v", None, 1, 2, 3)
        journal.leave()

    times = {"barrier": array("d"), "watched barrier": array("d"), "what the watch writes": array("d")}
    for _ in range(ROUNDS):
        for name, call in zip(times, (plain.barrier, watched.comm.barrier, note), strict=True):
            plain.barrier()
            times[name].append(microseconds(call))
    if plain.rank == 0:
        for name, values in times.items():
            sys.stdout.write(f"{name}: {min(values):.2f} us (least of {ROUNDS} rounds of {CALLS})\n")


main()
