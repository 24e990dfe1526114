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


@dataclass(slots=True)
class WatchedOperation:
    """An operation on the GPU that the watch follows.

    Attributes:
        done: Turns true when the work has ended.
        what: Name of the operation.
        group: Name of the group, or nothing.
        begun: Time at which it was started, of the monotonic clock in seconds.
        seconds: The deadline.
        problem: Names a failure that was found meanwhile, or None.
    """

    done: Done
    what: str
    group: str
    begun: float
    seconds: float
    problem: Problem

    def __str__(self) -> str:
        return f"{self.what} in group {self.group}" if self.group else self.what


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
        self._always: list[Problem] = [self.late_launch]
        self._launch: tuple[str, str, float, float] | None = None
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None

    def add(self, done: Done | None, what: str, seconds: float, problem: Problem, group: str = "") -> None:
        """Follow one more :class:`WatchedOperation`; ``done`` is None for one that is only captured."""
        if done is None:
            return
        self._waiting.append(WatchedOperation(done, what, group, time.monotonic(), seconds, problem))
        self._start()

    def begin_launch(self, what: str, seconds: float, group: str) -> None:
        """Report the launch of ``what`` unless :meth:`end_launch` is called within ``seconds``.

        The caller's thread is then inside a call that nothing can interrupt.
        """
        self._launch = (what, group, time.monotonic(), seconds)
        self._start()

    def end_launch(self) -> None:
        """Note that the launch has ended."""
        self._launch = None

    def late_launch(self) -> str | None:
        """Return what is wrong with the launch that is going on, or None."""
        launch = self._launch
        if launch is None or time.monotonic() - launch[2] <= launch[3]:
            return None
        return (
            f"{launch[0]} in group {launch[1]}: not launched by NCCL {launch[3]:g} s after it was asked; a "
            "rank of the group did not come, or cannot be reached (NCCL_DEBUG=INFO shows how far it got)"
        )

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
            return f"{oldest}: {problem}"
        if time.monotonic() - oldest.begun > oldest.seconds:
            return (
                f"{oldest}: not done on the GPU {oldest.seconds:g} s after it was started; a rank of "
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
