"""What each rank of a node is in the middle of, in memory that the others can read while it is blocked, stopped or dead.

The memory is a file without a name: nothing of it outlives the job's processes, whatever ends them.
"""

import fcntl
import mmap
import os
import struct
import tempfile
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mpi4py import MPI

PLACES = ("/dev/shm", None)
"""Folders to try for the file; None: Python's choice."""
OUTSIDE, INSIDE, FAILING, LEFT = range(4)
STATE = struct.Struct("=qd")
CALL = struct.Struct("=qdqqqqqqd64s32s")
SELF = struct.Struct("=qq")
LOCK = 192
"""Where in a row the rank's lock is (:mod:`xpar.comm.watchdog.death_lock`)."""
REPORTED = struct.Struct("=q")
ROW_BYTES = 256


@dataclass(frozen=True)
class Call:
    """A collective as one rank entered it: the ``seq``-th of ``group``, in ``layer`` and ``step`` if those are not -1.

    ``rows_out``, ``rows_in``: rows of ``row_bytes`` bytes each that leave and arrive. ``seconds``: its deadline.
    """

    op: str
    group: str
    seq: int
    layer: int
    step: int
    rows_out: int
    rows_in: int
    row_bytes: int
    seconds: float

    def __str__(self) -> str:
        layer = f", layer {self.layer}" if self.layer >= 0 else ""
        step = f", step {self.step}" if self.step >= 0 else ""
        arriving = f" out, {self.rows_in} in" if self.rows_in else ""
        sizes = f" ({self.rows_out} rows of {self.row_bytes} B{arriving})" if self.row_bytes else ""
        return f"{self.op} #{self.seq} of group {self.group}{sizes}{layer}{step}"


@dataclass(frozen=True)
class Entry:
    """A rank's row: ``state`` since ``age`` seconds, and the collective that it is in or was in last, if any."""

    state: int
    age: float
    call: Call | None
    pid: int
    stack_fd: int


class StatusBoard:
    """Row ``mine`` is this rank's to write. ``shared``: whether the other rows are really those of the node's ranks."""

    def __init__(self, memory: mmap.mmap, mine: int, size: int, file: int | None, shared: bool) -> None:
        self.memory, self.mine, self.size, self.file, self.shared = memory, mine, size, file, shared
        self._once = threading.Lock()

    @classmethod
    def open(cls, node: "MPI.Comm") -> "StatusBoard":
        """Collective over the ranks of a node. Where no file can be shared, each has a board of its own."""
        nbytes = node.size * ROW_BYTES
        path = node.bcast(_make_file(nbytes) if node.rank == 0 else None, root=0)
        file = _open_file(path)
        # Processes see each other's numbers only in one namespace; containers may give each its own.
        seen = node.allgather((file is not None, _pid_namespace()))
        if path is not None and node.rank == 0:
            with suppress(OSError):
                os.unlink(path)
        if file is not None and all(s == seen[0] for s in seen):
            return cls(mmap.mmap(file, nbytes), node.rank, node.size, file, True)
        return cls(mmap.mmap(-1, nbytes), node.rank, node.size, None, False)

    def introduce(self, stack_fd: int) -> None:
        """Say which process this is, and the descriptor of its file of stacks (-1 without)."""
        SELF.pack_into(self.memory, self.mine * ROW_BYTES + CALL.size, os.getpid(), stack_fd)
        self.set_state(OUTSIDE)

    def set_state(self, state: int) -> None:
        """This rank is in ``state`` from now on; what its last collective was stays."""
        STATE.pack_into(self.memory, self.mine * ROW_BYTES, state, time.monotonic())

    def read(self, local_rank: int) -> Entry:
        """What the row of a rank of this node says now."""
        first = local_rank * ROW_BYTES
        state, since, *numbers, seconds, op, group = CALL.unpack_from(self.memory, first)
        pid, stack_fd = SELF.unpack_from(self.memory, first + CALL.size)
        seq, layer, step, rows_out, rows_in, row_bytes = numbers
        call = Call(_text(op), _text(group), seq, layer, step, rows_out, rows_in, row_bytes, seconds)
        return Entry(state, time.monotonic() - since, call if seq else None, pid, stack_fd)

    def set_reported(self) -> None:
        """The job's report is written: nobody of the node writes another, whoever dies of it."""
        REPORTED.pack_into(self.memory, ROW_BYTES - REPORTED.size, 1)

    def reported(self) -> bool:
        return bool(REPORTED.unpack_from(self.memory, ROW_BYTES - REPORTED.size)[0])

    def claim(self) -> bool:
        """Whether this process may report: the first of the node to ask, as long as it lives or until it has."""
        if self.reported() or not self._once.acquire(blocking=False):
            return False
        if self.file is None:
            return True
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._once.release()
            return False
        return True


def _make_file(nbytes: int) -> str | None:
    for folder in PLACES:
        with suppress(OSError):
            file, path = tempfile.mkstemp(prefix="xpar-guard-", dir=folder)
            try:
                os.posix_fallocate(file, 0, nbytes)  # a full file system says so here, not by SIGBUS later
                return path
            except OSError:
                os.unlink(path)
            finally:
                os.close(file)
    return None


def _open_file(path: str | None) -> int | None:
    if path is None:
        return None
    try:
        return os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return None


def _pid_namespace() -> str:
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def _text(field: bytes) -> str:
    return field.rstrip(b"\0").decode(errors="replace")
