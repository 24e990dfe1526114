"""A thread that sees when work on the GPU does not end, although no rank is waiting for it in Python.

A collective is only launched by the call that asks for it. If a peer never comes, the GPU waits, and sooner or later
the host waits for the GPU inside a call that nothing can interrupt. This thread reports and ends the job instead.
"""

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

Done = Callable[[], bool]
Problem = Callable[[], str | None]


@dataclass(frozen=True)
class WatchedOperation:
    """``done`` turns true when the work has ended; ``problem`` names a failure found meanwhile."""

    done: Done
    what: str
    begun: float
    seconds: float
    problem: Problem


class Watch:
    """Follows operations in the order in which they were started, and calls ``fail`` once with the first that is late.

    The thread starts with the first operation and is a daemon. While a CUDA graph is captured in torch's default mode
    no other thread may ask about events: capture inside :meth:`paused`.
    """

    def __init__(self, fail: Callable[[str], None], pause: float = 0.2) -> None:
        self._fail, self._pause = fail, pause
        self._waiting: deque[WatchedOperation] = deque()
        self._asking = threading.Lock()
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None

    def add(self, done: Done | None, what: str, seconds: float, problem: Problem) -> None:
        """Follow one more operation; None is one that cannot be followed, because it is only being captured."""
        if done is None:
            return
        self._waiting.append(WatchedOperation(done, what, time.monotonic(), seconds, problem))
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="xpar-gpu-watch", daemon=True)
            self._thread.start()

    def paused(self) -> threading.Lock:
        """``with watch.paused(): …``: the thread asks nothing meanwhile."""
        return self._asking

    def look(self) -> str | None:
        """Forget what has ended; what is wrong with the oldest operation that has not, or None."""
        with self._asking:
            while self._waiting and self._waiting[0].done():
                self._waiting.popleft()
            if not self._waiting:
                return None
            oldest = self._waiting[0]
            problem = oldest.problem()
        if problem is not None:
            return f"{oldest.what}: {problem}"
        if time.monotonic() - oldest.begun > oldest.seconds:
            return (
                f"{oldest.what}: not done on the GPU {oldest.seconds:g} s after it was started; a rank of the group did "
                "not take part, or the GPU hangs"
            )
        return None

    def close(self) -> None:
        """End the thread; nothing is followed any more."""
        self._closed.set()
        if self._thread is not None:
            self._thread.join()

    @staticmethod
    def wait(done: Done, seconds: float, problem: Problem) -> bool:
        """Poll ``done`` for at most ``seconds``; whether it came true. A ``problem`` ends the waiting too."""
        deadline = time.monotonic() + seconds
        while not done():
            if time.monotonic() > deadline or problem() is not None:
                return False
            time.sleep(5e-5)
        return True

    def _run(self) -> None:
        wrong = None
        while wrong is None:
            if self._closed.wait(self._pause):
                return
            try:
                wrong = self.look()
            except RuntimeError as error:  # a CUDA error of an earlier kernel shows wherever the GPU is asked
                wrong = f"the GPU reports {error}"
        self._fail(wrong)
