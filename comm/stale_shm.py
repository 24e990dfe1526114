"""Files that killed MPI jobs left in shared memory.

They fill it, and one of them can stop the next MPI_Init. MPICH names its file after the job's number: a job
of the same number and another size ends in ``Out of memory``.
"""

import os
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

PREFIXES = ("mpich_shm_", "sm_segment.", "vader_segment.")
"""Beginnings of the file names of MPICH, Open MPI 5 and Open MPI 4."""
YOUNG_S = 60.0
"""seconds; a file that is younger may belong to a job that is just starting"""


@dataclass(frozen=True)
class StaleFiles:
    """The number of stale files and the bytes that they occupy."""

    files: int
    nbytes: int


def find_stale_files(folder: Path) -> StaleFiles:
    """Count this user's MPI files in ``folder`` that no process maps any more."""
    found = {}
    with suppress(OSError):
        for entry in os.scandir(folder):
            if entry.name.startswith(PREFIXES):
                with suppress(OSError):
                    found[entry.path] = entry.stat()
    limit = time.time() - YOUNG_S
    old = {path: stat for path, stat in found.items() if stat.st_uid == os.getuid() and stat.st_mtime < limit}
    stale = set(old) - _mapped(set(old)) if old else set()
    return StaleFiles(len(stale), sum(old[path].st_blocks * 512 for path in stale))


def _mapped(paths: set[str]) -> set[str]:
    """Return those of ``paths`` that a process maps."""
    used = set()
    for maps in Path("/proc").glob("[0-9]*/maps"):
        with suppress(OSError):
            used |= {line.split(maxsplit=5)[-1] for line in maps.read_text(errors="replace").splitlines()}
    return paths & used
