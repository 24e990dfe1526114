"""Times on the device: a CUDA graph of several calls on different inputs, and the same calls launched one by one."""

import statistics
import time
from collections.abc import Callable, Sequence

import torch


def graph_time(calls: Sequence[Callable[[], object]], budget: float = 0.15) -> float:
    """Median seconds per call over replays of one graph that holds ``calls`` in turn.

    Calls on different random inputs read other experts' weights each time, so that a small batch does not find all
    it needs in cache. ``budget``: seconds spent on replays.
    """
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return _median(graph.replay, budget) / len(calls)


def eager_time(calls: Sequence[Callable[[], object]], budget: float = 0.15) -> float:
    """Seconds per call of a loop over ``calls`` that waits for the device only at its end."""

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


def _median(action: Callable[[], object], budget: float) -> float:
    """Median seconds of ``action`` between two events on the device."""
    action()
    torch.cuda.synchronize()
    times: list[float] = []
    begin = time.perf_counter()
    while len(times) < 5 or (time.perf_counter() - begin < budget and len(times) < 200):
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        first.record()
        action()
        last.record()
        last.synchronize()
        times.append(first.elapsed_time(last) / 1e3)
    return statistics.median(times)
