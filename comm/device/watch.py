"""A thread that ends the job if work on the GPU does not end.

The call that asks for a collective only launches it. If a peer never comes, the GPU waits, and sooner
or later the host waits for the GPU inside a call that nothing can interrupt. This thread reports and
ends the job instead.
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
    """An operation on the GPU that the watch follows.

    Attributes:
        done: Turns true when the work has ended.
        what: Name of the operation.
        begun: Time at which it was started, of the monotonic clock in seconds.
        seconds: The deadline.
        problem: Names a failure that was found meanwhile, or None.
    """

    done: Done
    what: str
    begun: float
    seconds: float
    problem: Problem


class Watch:
    """Follows operations on the GPU in the order of their start, and reports a late one.

    The thread starts with the first operation and is a daemon. While a CUDA graph is captured in
    torch's default mode, no other thread may query events: capture inside :meth:`paused`.

    Args:
        fail: Called once, with what is wrong.
        pause: Seconds between two looks.
    """

    def __init__(self, fail: Callable[[str], None], pause: float = 0.2) -> None:
        self._fail, self._pause = fail, pause
        self._waiting: deque[WatchedOperation] = deque()
        self._is_querying = threading.Lock()
        self._always: list[Problem] = []
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None

    def add(self, done: Done | None, what: str, seconds: float, problem: Problem) -> None:
        """Follow one more :class:`WatchedOperation`; ``done`` is None for one that is only captured."""
        if done is None:
            return
        self._waiting.append(WatchedOperation(done, what, time.monotonic(), seconds, problem))
        self._start()

    def always(self, problem: Problem) -> None:
        """Ask ``problem`` in every round, whatever is followed besides; it must not ask the GPU."""
        self._always.append(problem)
        self._start()

    def paused(self) -> threading.Lock:
        """Return a context manager within which the thread queries nothing."""
        return self._is_querying

    def check(self) -> str | None:
        """Forget the operations that have ended; return what is wrong with the oldest other one."""
        with self._is_querying:
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
                f"{oldest.what}: not done on the GPU {oldest.seconds:g} s after it was started; a rank of "
                "the group did not take part, or the GPU hangs"
            )
        return None

    def _start(self) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="xpar-gpu-watch", daemon=True)
            self._thread.start()

    def close(self) -> None:
        """End the thread and follow nothing any more."""
        self._closed.set()
        if self._thread is not None:
            self._thread.join()

    @staticmethod
    def wait(done: Done, seconds: float, problem: Problem) -> bool:
        """Poll ``done`` for at most ``seconds``, or until ``problem``; whether it came true."""
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
                wrong = next(filter(None, (problem() for problem in self._always)), None) or self.check()
            except RuntimeError as error:  # a CUDA error of an earlier kernel shows wherever the GPU is asked
                wrong = f"the GPU reports {error}"
        self._fail(wrong)
