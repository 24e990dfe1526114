"""The memory of node, process and C library: freed memory stays with the process, ready for the next step.

By default glibc returns the end of its heap to the kernel as soon as it is free, and maps every large block
afresh. A layer's buffers are a few MB and live for one step, so the kernel would clear the same pages in
every layer.
"""

import ctypes
import gc
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h
TRIM_ABOVE = 2**30
MAP_ABOVE = 2**25
"""Bytes; the most that glibc takes. Weights lie above, and return to the kernel when they are dropped."""


def keep_freed_memory() -> bool:
    """Let this process keep up to 1 GiB that it has freed; return whether its C library can (glibc).

    Changes no result. The command ``xpar`` does it; in a program of one's own it is one call at the start.
    """
    mallopt = _of_c_library("mallopt")
    if mallopt is None:
        return False
    return bool(mallopt(M_TRIM_THRESHOLD, TRIM_ABOVE)) and bool(mallopt(M_MMAP_THRESHOLD, MAP_ABOVE))


def give_back_freed_memory() -> bool:
    """Return all free memory to the kernel; return whether there was any (glibc)."""
    trim = _of_c_library("malloc_trim")
    return trim is not None and bool(trim(0))


@contextmanager
def without_collection() -> Iterator[None]:
    """Keep Python from looking for unreachable cycles in the body of the ``with``, which imports much.

    Modules stay, and every look at all their objects would take a rank a tenth of a second.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def available_bytes() -> float:
    """Return the bytes of memory that this node has left; infinity if the system does not tell.

    A container's limit counts where it is lower.
    """
    meminfo = Path("/proc/meminfo")
    found = float("inf")
    for line in meminfo.read_text().splitlines() if meminfo.exists() else []:
        if line.startswith("MemAvailable:"):
            found = float(line.split()[1]) * 1024
    return min(found, _container_bytes(Path("/sys/fs/cgroup")))


def peak_bytes() -> int:
    """Return the most memory in bytes that this process had at any time."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def resident_bytes() -> int:
    """Return the memory in bytes that this process has now; the peak where the system does not tell."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    except OSError:
        return peak_bytes()


def _container_bytes(group: Path) -> float:
    """Return the bytes that a control group ``group`` has left; infinity without a limit."""
    try:
        limit, used = ((group / name).read_text().strip() for name in ("memory.max", "memory.current"))
        return float("inf") if limit == "max" else float(int(limit) - int(used))
    except (OSError, ValueError):
        return float("inf")


def _of_c_library(name: str) -> Any:
    return getattr(ctypes.CDLL(None), name, None) if sys.platform.startswith("linux") else None
