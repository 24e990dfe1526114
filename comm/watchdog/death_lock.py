"""Notice of a rank's death before its launcher has it: a lock in shared memory that the kernel lets go for a dead owner.

A launcher hears of a death when the process's sockets close, and some then kill the other ranks at once. The kernel lets
go of a process's robust locks earlier, before it takes its memory apart: that leaves the others some tens of milliseconds
where torch is loaded.
"""

import ctypes
import errno
import mmap
import threading
from collections.abc import Callable

LOCK_BYTES = 56
"""Room for a pthread_mutex_t: 40 bytes on x86-64, 48 on ARM."""
ATTRIBUTE_BYTES = 64
SHARED, ROBUST = 1, 1
"""PTHREAD_PROCESS_SHARED, PTHREAD_MUTEX_ROBUST."""


class DeathLock:
    """This process's lock at ``mine``, a multiple of 8, in memory that other processes of the machine map, too.

    One thread holds it for as long as the process lives, and waits for another's.
    """

    def __init__(self, memory: mmap.mmap, mine: int) -> None:
        self._memory, self._mine = memory, mine
        self._held, self._ready, self._told = False, threading.Event(), threading.Event()
        self._theirs: int | None = None
        self._call: Callable[[], None] | None = None

    def hold(self) -> bool:
        """Take this process's lock; False where this machine has none of the kind."""
        threading.Thread(target=self._run, name="xpar-guard-tripwire", daemon=True).start()
        self._ready.wait()
        return self._held

    def watch(self, theirs: int, call: Callable[[], None]) -> None:
        """Once: ``call``, in the thread that holds, when the owner of the lock at ``theirs``, held by now, has died."""
        self._theirs, self._call = theirs, call
        self._told.set()

    def _run(self) -> None:
        try:
            _make(self._memory, self._mine)
            self._held = _lock(self._memory, self._mine) == 0
        except (AttributeError, OSError):  # a C library without them
            self._held = False
        self._ready.set()
        if not self._held:
            return
        self._told.wait()
        assert self._theirs is not None and self._call is not None
        if _lock(self._memory, self._theirs) == errno.EOWNERDEAD:
            self._call()
        threading.Event().wait()  # an owner is a thread: this one must not end


def _make(memory: mmap.mmap, place: int) -> None:
    libc, attribute = ctypes.CDLL(None), ctypes.create_string_buffer(ATTRIBUTE_BYTES)
    status = libc.pthread_mutexattr_init(attribute)
    status = status or libc.pthread_mutexattr_setpshared(attribute, SHARED)
    status = status or libc.pthread_mutexattr_setrobust(attribute, ROBUST)
    status = status or libc.pthread_mutex_init(_address(memory, place), attribute)
    if status:
        raise OSError(status, "no robust lock in shared memory")


def _lock(memory: mmap.mmap, place: int) -> int:
    """Wait for the lock at ``place``, without the interpreter's; the error number."""
    return int(ctypes.CDLL(None).pthread_mutex_lock(_address(memory, place)))


def _address(memory: mmap.mmap, place: int) -> ctypes.c_void_p:
    return ctypes.c_void_p(ctypes.addressof(ctypes.c_char.from_buffer(memory, place)))
