"""The state of each rank of a node, in memory that all of them read.

They can read it while the rank is blocked, stopped or dead. The memory is a file without a name, so that
nothing of it outlives the job's processes, whatever ends them. Every rank has a row of 256 bytes:

======== ======== =====================================================================
bytes    layout   contents
======== ======== =====================================================================
0-167    CALL     the state and its time (STATE), then the last collective
168-183  SELF     the process's number, the descriptor of its file of stacks
192-247  LOCK     the lock that the kernel releases when the process dies
248-255  REPORTED in row 0 only: whether the job's report is written
======== ======== =====================================================================
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

FOLDERS = ("/dev/shm", None)
"""Folders to try for the file; None is Python's choice."""
OUTSIDE, INSIDE, FAILING, LEFT = range(4)
"""The states of a rank: in no collective, in one, about to end the job, at the end of its program."""
STATE = struct.Struct("=qd")
CALL = struct.Struct("=qdqqqqqqd64s32s")
SELF = struct.Struct("=qq")
LOCK = 192
"""offset in a row of the rank's lock (:mod:`xpar.comm.watchdog.death_lock`)"""
REPORTED = struct.Struct("=q")
ROW_BYTES = 256


@dataclass(frozen=True)
class Call:
    """A collective as one rank entered it, number ``seq`` of those of the group, from 1.

    ``layer``, ``step``: -1 outside. ``rows_out``, ``rows_in``: rows that leave and arrive, of ``row_bytes``.
    ``seconds``: the deadline.
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
    """The row of one rank: in ``state`` (OUTSIDE, INSIDE, FAILING or LEFT) for ``age`` seconds.

    ``call``: the collective that it is in or was in last, if any. ``stack_fd``: the descriptor of its file of
    stacks, -1 without one.
    """

    state: int
    age: float
    call: Call | None
    pid: int
    stack_fd: int


class StatusBoard:
    """The rows of a node's ranks; each rank writes its own row, ``local_rank``, and reads all.

    ``file``: descriptor of the file behind ``memory``, None without one. ``shared``: whether the other rows
    are really written by the node's ranks.
    """

    def __init__(self, memory: mmap.mmap, local_rank: int, size: int, file: int | None, shared: bool) -> None:
        self.memory, self.local_rank, self.size = memory, local_rank, size
        self.file, self.shared = file, shared
        self._is_claimed = threading.Lock()

    @classmethod
    def open(cls, node: "MPI.Comm") -> "StatusBoard":
        """Open a node's board; collective. Without a shared file each rank has its own."""
        nbytes = node.size * ROW_BYTES
        path = node.bcast(create_file(nbytes) if node.rank == 0 else None, root=0)
        file = _open_file(path)
        # Processes see each other's numbers only in one namespace; containers may give each its own.
        seen = node.allgather((file is not None, _pid_namespace()))
        if path is not None and node.rank == 0:
            with suppress(OSError):
                os.unlink(path)
        if file is not None and all(s == seen[0] for s in seen):
            return cls(mmap.mmap(file, nbytes), node.rank, node.size, file, True)
        return cls(mmap.mmap(-1, nbytes), node.rank, node.size, None, False)

    def register_process(self, stack_fd: int) -> None:
        """Write this process's number and its file of stacks (-1 without) to its row."""
        SELF.pack_into(self.memory, self.local_rank * ROW_BYTES + CALL.size, os.getpid(), stack_fd)
        self.set_state(OUTSIDE)

    def set_state(self, state: int) -> None:
        """Set this rank's state; the row keeps its last collective."""
        STATE.pack_into(self.memory, self.local_rank * ROW_BYTES, state, time.monotonic())

    def read(self, local_rank: int) -> Entry:
        """Read the row of a rank of this node."""
        first = local_rank * ROW_BYTES
        state, since, *numbers, seconds, op, group = CALL.unpack_from(self.memory, first)
        pid, stack_fd = SELF.unpack_from(self.memory, first + CALL.size)
        seq, layer, step, rows_out, rows_in, row_bytes = numbers
        call = Call(_text(op), _text(group), seq, layer, step, rows_out, rows_in, row_bytes, seconds)
        return Entry(state, time.monotonic() - since, call if seq else None, pid, stack_fd)

    def set_reported(self) -> None:
        """Say that the job's report is written, so that no rank of the node writes another."""
        REPORTED.pack_into(self.memory, ROW_BYTES - REPORTED.size, 1)

    def is_reported(self) -> bool:
        """Return whether the job's report is written."""
        return bool(REPORTED.unpack_from(self.memory, ROW_BYTES - REPORTED.size)[0])

    def claim_report(self) -> bool:
        """Claim the report; true for the first process of the node, and again if that dies."""
        if self.is_reported() or not self._is_claimed.acquire(blocking=False):
            return False
        if self.file is None:
            return True
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._is_claimed.release()
            return False
        return True


def create_file(nbytes: int) -> str | None:
    """Make a file of ``nbytes`` for a board; return its path, None without room for it."""
    for folder in FOLDERS:
        with suppress(OSError):
            file, path = tempfile.mkstemp(prefix="xpar-watchdog-", dir=folder)
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
