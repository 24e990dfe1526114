"""Timing of several contenders in turn, and of calls on a GPU; peak memory."""

import resource
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from xpar.comm.communicator import Communicator
from xpar.engine.bench.gpu_turns import Turns, start_reading_card, take_bursts
from xpar.engine.layer.cuda_graph import rehearse

SETTLE_S = 0.01
"""Threads of a pool spin for some milliseconds after their last work, on cores that other ranks use next."""
LEAST_ROUNDS, MOST_ROUNDS = 5, 60
WARM_UP_ROUNDS = 2
"""Rounds of :func:`take_turns` before those that it counts."""
REPLAYS = 20
"""Calls between two readings of the clock on a GPU: one call is shorter than a reading takes."""


@dataclass(frozen=True)
class Contender:
    """One way to do the work: ``call`` runs batch n and returns its seconds; ``alone``: on rank 0 only."""

    name: str
    call: Callable[[int], float]
    alone: bool = False


@dataclass(frozen=True)
class Times:
    """The seconds of every round, each of the slowest rank."""

    seconds: tuple[float, ...]

    @property
    def median_ms(self) -> float:
        return statistics.median(self.seconds) * 1e3

    @property
    def min_ms(self) -> float:
        return min(self.seconds) * 1e3

    def ratio(self, other: "Times") -> float:
        """Return how many times longer ``other`` takes: a median over rounds cancels slow moments."""
        return statistics.median(o / s for o, s in zip(other.seconds, self.seconds, strict=True))


def take_turns(
    comm: Communicator, contenders: Sequence[Contender], batches: int, seconds: float
) -> dict[str, Times]:
    """Run every contender once per round, so that a slow minute falls on all; collective.

    ``batches``: different batches, which the rounds go through. ``seconds``: about how long to measure in
    all; two rounds before say how many rounds fit: 5 to 60.
    """
    warm = _run_round(comm, contenders, 0) + _run_round(comm, contenders, batches - 1)
    rounds = max(LEAST_ROUNDS, min(MOST_ROUNDS, int(2 * seconds / max(sum(warm), 1e-9))))
    table = [_run_round(comm, contenders, r % batches) for r in range(rounds)]
    return {c.name: Times(tuple(row[i] for row in table)) for i, c in enumerate(contenders)}


def _run_round(comm: Communicator, contenders: Sequence[Contender], batch: int) -> list[float]:
    mine = [_run_once(comm, contender, batch) for contender in contenders]
    return [max(times) for times in zip(*comm.all_gather_object(mine), strict=True)]


def _run_once(comm: Communicator, contender: Contender, batch: int) -> float:
    comm.barrier()
    if not contender.alone:
        return contender.call(batch)
    elapsed = 0.0
    if comm.rank == 0:
        elapsed = contender.call(batch)
        time.sleep(SETTLE_S)
    comm.barrier(patient=True)
    return elapsed


def graph_time(calls: Sequence[Callable[[], object]], budget: float = 0.15) -> float:
    """Measure the median seconds per call of one CUDA graph that holds ``calls`` in turn.

    Calls on different random inputs read other experts' weights each time, so that a small batch does not
    find all its weights in cache. ``budget``: seconds to spend on replays.
    """
    return _event_time(record_graph(calls).replay, budget) / len(calls)


def times_in_turn(
    calls: Mapping[str, Sequence[Callable[[], object]]], rounds: int = 12, burst: float = 2e-3
) -> dict[str, float]:
    """Measure the median seconds per call of several contenders, each as one CUDA graph of its calls."""
    graphs = {name: record_graph(own) for name, own in calls.items()}
    turns = graphs_in_turn(graphs, rounds, burst, has_card=False)
    return {name: turns.median(name) / len(calls[name]) for name in calls}


def graphs_in_turn(
    graphs: Mapping[str, torch.cuda.CUDAGraph], rounds: int, burst: float, has_card: bool = True
) -> Turns:
    """Measure the seconds of a replay of several graphs, in bursts of about ``burst`` seconds in turn.

    ``has_card``: True if the card's clock and power are read, which may take a second.
    """
    replays = {name: max(1, round(burst / _event_time(graph.replay, 0.0))) for name, graph in graphs.items()}

    def run_burst(name: str) -> float:
        return _seconds_between_events(graphs[name].replay, replays[name]) / replays[name]

    return take_bursts(
        {name: partial(run_burst, name) for name in graphs}, rounds, start_reading_card if has_card else None
    )


def record_graph(calls: Sequence[Callable[[], object]]) -> torch.cuda.CUDAGraph:
    """Record ``calls`` in turn as one CUDA graph, after a rehearsal."""
    rehearse(lambda: [call() for call in calls], 1, torch.device("cuda", torch.cuda.current_device()))
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph


def eager_time(calls: Sequence[Callable[[], object]], budget: float = 0.15) -> float:
    """Measure the seconds per call of a loop that waits for the GPU only at its end."""

    def loop() -> None:
        for call in calls:
            call()

    loop()
    torch.cuda.synchronize()
    times: list[float] = []
    begin = time.perf_counter()
    while len(times) < 3 or time.perf_counter() - begin < budget:
        start = time.perf_counter()
        loop()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times) / len(calls)


def host_time(calls: Sequence[Callable[[], object]], rounds: int = 5) -> float:
    """Measure the median seconds of a call on the CPU over ``rounds`` rounds of ``calls``."""
    times = []
    for call in [*calls] * rounds:
        begin = time.perf_counter()
        call()
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


def _event_time(action: Callable[[], object], budget: float) -> float:
    """Measure the median seconds of ``action`` between two events on the GPU."""
    action()
    torch.cuda.synchronize()
    times: list[float] = []
    begin = time.perf_counter()
    while len(times) < 5 or (time.perf_counter() - begin < budget and len(times) < 200):
        times.append(_seconds_between_events(action, 1))
    return statistics.median(times)


def _seconds_between_events(action: Callable[[], object], repeats: int) -> float:
    """Measure the seconds of ``repeats`` of ``action`` between two events on the GPU."""
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    first.record()
    for _ in range(repeats):
        action()
    last.record()
    last.synchronize()
    return float(first.elapsed_time(last)) / 1e3


def peak_bytes() -> int:
    """Return the most memory in bytes that this process had at any time."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
