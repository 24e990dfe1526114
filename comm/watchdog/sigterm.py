"""A handler of SIGTERM, by which launchers and people end jobs, that works while MPI blocks the process."""

import os
import signal
import threading
from collections.abc import Callable


def on_sigterm(call: Callable[[], None]) -> None:
    """Have another thread call ``call``, which ends the process, when SIGTERM comes.

    To be used from the main thread. A program that has a handler of its own, now or later, keeps it. Python's
    handlers only run once the main thread is back from MPI. But the C handler writes a byte to a pipe at
    once, and a thread waits for that byte.
    """
    in_main = threading.current_thread() is threading.main_thread()
    if not in_main or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        return
    is_handled = threading.Lock()

    def handle(*_: object) -> None:
        if is_handled.acquire(blocking=False):
            threading.Thread(target=call, name="xpar-watchdog-sigterm", daemon=True).start()

    def listen(reader: int) -> None:
        while numbers := os.read(reader, 64):
            if signal.SIGTERM in numbers and _is_handler(handle):
                handle()

    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    previous = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    if previous == -1:
        threading.Thread(target=listen, args=(reader,), name="xpar-watchdog-signals", daemon=True).start()
    else:  # another library listens there and would miss its bytes
        signal.set_wakeup_fd(previous)
    _reset_in_children(handle)
    signal.signal(signal.SIGTERM, handle)


def _is_handler(handler: object) -> bool:
    return signal.getsignal(signal.SIGTERM) is handler


def _reset_in_children(handler: Callable[..., None]) -> None:
    """Remove handler and pipe in forked children, which would take their SIGTERM for their parent's.

    SIGTERM is blocked while a process forks: Python drops signals that come before the child is set up.
    """
    masks: dict[int, set[int]] = {}  # the signal mask of each thread that forks

    def before() -> None:
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
        masks[threading.get_ident()] = {int(number) for number in blocked}

    def after() -> None:
        signal.pthread_sigmask(signal.SIG_SETMASK, masks.pop(threading.get_ident()))

    def after_in_child() -> None:
        if _is_handler(handler):
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            signal.set_wakeup_fd(-1)
        after()

    os.register_at_fork(before=before, after_in_parent=after, after_in_child=after_in_child)
