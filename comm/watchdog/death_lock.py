"""Early notice of a rank's death by a lock that the kernel releases for a dead owner.

A launcher learns of a death when the process's sockets close, and some launchers then kill the other ranks at
once. The kernel releases a process's robust locks before that, before it takes the process's memory apart. If
torch is loaded, that leaves the other ranks some tens of milliseconds.
"""

import ctypes
import errno
import mmap
import threading
from collections.abc import Callable

LOCK_BYTES = 56
"""bytes for a pthread_mutex_t, which has 40 on x86-64 and 48 on ARM"""
ATTRIBUTE_BYTES = 64
"""bytes for a pthread_mutexattr_t, more than any C library needs"""
SHARED, ROBUST = 1, 1
"""PTHREAD_PROCESS_SHARED, PTHREAD_MUTEX_ROBUST."""


class DeathLock:
    """This process's lock in shared ``memory``, at ``offset``, a multiple of 8.

    One thread owns the lock for as long as the process lives, and waits for the lock of another process.
    """

    def __init__(self, memory: mmap.mmap, offset: int) -> None:
        self._memory, self._offset = memory, offset
        self._is_acquired, self._is_ready, self._has_target = False, threading.Event(), threading.Event()
        self._target: int | None = None
        self._on_death: Callable[[], None] | None = None

    def acquire(self) -> bool:
        """Start the thread that owns the lock; False if this machine has no robust locks."""
        threading.Thread(target=self._run, name="xpar-watchdog-death-lock", daemon=True).start()
        self._is_ready.wait()
        return self._is_acquired

    def watch(self, offset: int, on_death: Callable[[], None]) -> None:
        """Call ``on_death`` in the lock's thread when the owner of the lock at ``offset`` dies; once."""
        self._target, self._on_death = offset, on_death
        self._has_target.set()

    def _run(self) -> None:
        try:
            _make(self._memory, self._offset)
            self._is_acquired = _lock(self._memory, self._offset) == 0
        except (AttributeError, OSError):  # a C library without robust locks
            self._is_acquired = False
        self._is_ready.set()
        if not self._is_acquired:
            return
        self._has_target.wait()
        assert self._target is not None and self._on_death is not None
        if _lock(self._memory, self._target) == errno.EOWNERDEAD:
            self._on_death()
        threading.Event().wait()  # the owner of a lock is a thread: this one must not end


def _make(memory: mmap.mmap, offset: int) -> None:
    libc, attribute = ctypes.CDLL(None), ctypes.create_string_buffer(ATTRIBUTE_BYTES)
    status = libc.pthread_mutexattr_init(attribute)
    status = status or libc.pthread_mutexattr_setpshared(attribute, SHARED)
    status = status or libc.pthread_mutexattr_setrobust(attribute, ROBUST)
    status = status or libc.pthread_mutex_init(_address(memory, offset), attribute)
    if status:
        raise OSError(status, "no robust lock in shared memory")


def _lock(memory: mmap.mmap, offset: int) -> int:
    """Wait for the lock at ``offset``, without the interpreter's; return the error number."""
    return int(ctypes.CDLL(None).pthread_mutex_lock(_address(memory, offset)))


def _address(memory: mmap.mmap, offset: int) -> ctypes.c_void_p:
    return ctypes.c_void_p(ctypes.addressof(ctypes.c_char.from_buffer(memory, offset)))
