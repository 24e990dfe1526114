"""Files that MPI jobs left in shared memory when they were killed; they fill it, and one can stop the next MPI_Init.

MPICH names its file after the job's number: one of a job of the same number and another size ends in ``Out of memory``.
"""

import os
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

PREFIXES = ("mpich_shm_", "sm_segment.", "vader_segment.")
"""Of MPICH and of Open MPI 5 and 4."""
YOUNG_S = 60.0
"""A file that is younger may belong to a job that is just starting."""


@dataclass(frozen=True)
class StaleFiles:
    files: int
    nbytes: int


def find_stale_files(folder: Path) -> StaleFiles:
    """Of this user, in ``folder``: files of MPI that no process maps any more."""
    found = {}
    with suppress(OSError):
        for entry in os.scandir(folder):
            if entry.name.startswith(PREFIXES):
                with suppress(OSError):
                    found[entry.path] = entry.stat()
    limit = time.time() - YOUNG_S
    old = {path: stat for path, stat in found.items() if stat.st_uid == os.getuid() and stat.st_mtime < limit}
    left = set(old) - _mapped(set(old)) if old else set()
    return StaleFiles(len(left), sum(old[path].st_blocks * 512 for path in left))


def _mapped(paths: set[str]) -> set[str]:
    used = set()
    for maps in Path("/proc").glob("[0-9]*/maps"):
        with suppress(OSError):
            used |= {line.split(maxsplit=5)[-1] for line in maps.read_text(errors="replace").splitlines()}
    return paths & used
