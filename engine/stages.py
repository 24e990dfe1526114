"""Time per pipeline stage, measured where a caller asks for it and free where nobody does."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

STAGES = ("route", "plan", "dispatch", "compute", "combine", "shared", "finish")


class StageClock:
    """Wall-clock seconds of each stage of one forward. ``slots``: (token, expert) pairs computed on this rank."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(STAGES, 0.0)
        self.slots = 0

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        begin = time.perf_counter()
        yield
        self.seconds[name] += time.perf_counter() - begin
