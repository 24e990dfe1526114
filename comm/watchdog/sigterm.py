"""SIGTERM, by which launchers and people end a job, heard also by a process that is blocked inside MPI."""

import os
import signal
import threading
from collections.abc import Callable


def on_sigterm(call: Callable[[], None]) -> None:
    """Have ``call``, which ends the process, called in another thread when SIGTERM comes; from the main thread.

    A program that has a handler of its own, now or later, keeps it. Python's handlers only run once the main thread is
    back from MPI; the byte that the C handler writes comes at once.
    """
    in_main = threading.current_thread() is threading.main_thread()
    if not in_main or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        return
    begun = threading.Lock()

    def begin(*_: object) -> None:
        if begun.acquire(blocking=False):
            threading.Thread(target=call, name="xpar-guard-told", daemon=True).start()

    def listen(reader: int) -> None:
        while numbers := os.read(reader, 64):
            if signal.SIGTERM in numbers and _handles(begin):
                begin()

    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    if before == -1:
        threading.Thread(target=listen, args=(reader,), name="xpar-guard-ear-sigterm", daemon=True).start()
    else:  # somebody else's, who would miss its bytes
        signal.set_wakeup_fd(before)
    _forget_in_children(begin)
    signal.signal(signal.SIGTERM, begin)


def _handles(handler: object) -> bool:
    return signal.getsignal(signal.SIGTERM) is handler


def _forget_in_children(handler: Callable[..., None]) -> None:
    """Keep a child, which has the handler and the pipe, too, from taking its own SIGTERM for its parent's.

    The signal waits while a process forks: Python forgets what comes before the child is set up.
    """
    masks: dict[int, set[int]] = {}  # of each thread that forks

    def before() -> None:
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
        masks[threading.get_ident()] = {int(number) for number in blocked}

    def after() -> None:
        signal.pthread_sigmask(signal.SIG_SETMASK, masks.pop(threading.get_ident()))

    def after_in_child() -> None:
        if _handles(handler):
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            signal.set_wakeup_fd(-1)
        after()

    os.register_at_fork(before=before, after_in_parent=after, after_in_child=after_in_child)
