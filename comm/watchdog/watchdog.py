"""The watchdog of one rank, a thread that sees late collectives and dead neighbours."""

import atexit
import os
import secrets
import select
import socket
import threading
import time
from array import array
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, NoReturn

from xpar.comm.watchdog import stack_dump
from xpar.comm.watchdog.deadlines import Deadlines
from xpar.comm.watchdog.death_lock import DeathLock
from xpar.comm.watchdog.journal import BoardJournal, StepDeadline
from xpar.comm.watchdog.node_service import NodeServer, RankAddress
from xpar.comm.watchdog.reporter import EXIT_CODE, Reporter
from xpar.comm.watchdog.status_board import FAILING, INSIDE, LEFT, LOCK, ROW_BYTES, Call, StatusBoard

if TYPE_CHECKING:
    from mpi4py import MPI

POLL_MS = 250
"""milliseconds between two looks at this rank's own row"""
GRACE_S = 1.0
"""seconds that a process which ended by itself, or a launcher that ends the job, has to say why"""


@dataclass(frozen=True)
class WatchdogOptions:
    """Optional work: compare every collective on all ranks before it begins; record waits for stragglers."""

    check_collectives: bool = False
    record_waits: bool = False


class Watchdog:
    """The watchdog of one rank of a job of several ranks; make it with :meth:`start`."""

    def __init__(self, reporter: Reporter, deadlines: Deadlines, options: WatchdogOptions) -> None:
        self.reporter, self.deadlines, self.options = reporter, deadlines, options
        self._board = board = reporter.board
        self._step_deadline = StepDeadline(deadlines)
        self._journals: list[BoardJournal] = []
        self._groups: dict[str, tuple[int, ...]] = {}
        self._before_end: list[Callable[[], None]] = []
        board.register_process(stack_dump.register_stack_dump())
        self._death_lock = DeathLock(board.memory, board.local_rank * ROW_BYTES + LOCK)

    @classmethod
    def start(
        cls,
        world: "MPI.Comm",
        node: "MPI.Comm",
        node_of: Sequence[int],
        deadlines: Deadlines,
        options: WatchdogOptions,
    ) -> "Watchdog":
        """Start the watchdogs of all ranks of ``world``, those of ``node`` on one node; collective."""
        reporter = Reporter(StatusBoard.open(node), world.rank, world.Abort)
        watchdog = cls(reporter, deadlines, options)
        key: bytes = world.bcast(secrets.token_bytes(16) if world.rank == 0 else None, root=0)
        address = None
        if max(node_of):
            with suppress(OSError):  # a node without a server is reported as one that does not answer
                address = NodeServer(key, reporter.answer).address
        own = RankAddress(
            socket.gethostname(),
            node_of[world.rank],
            node.rank,
            address,
            has_death_lock=watchdog._death_lock.acquire(),
        )
        reporter.connect(key, tuple(world.allgather(own)))
        atexit.register(reporter.board.set_state, LEFT)
        threading.Thread(target=watchdog._watch, name="xpar-watchdog", daemon=True).start()
        return watchdog

    def journal(self, group: str, world_ranks: Sequence[int]) -> BoardJournal:
        """Make the journal of the communicator ``group`` of the given world ranks."""
        self._groups[group] = tuple(world_ranks)
        waits = array("d") if self.options.record_waits else None
        journal = BoardJournal(self._board, group, self._step_deadline, self.options.check_collectives, waits)
        self._journals.append(journal)
        return journal

    def take_waits(self) -> dict[tuple[str, tuple[int, ...]], list[float]]:
        """Return each group's seconds of waiting since the last call, by name and world ranks."""
        taken = {}
        for journal in self._journals:
            if journal.waits is not None:
                taken[journal.group, self._groups[journal.group]] = journal.waits.tolist()
                del journal.waits[:]
        return taken

    def before_end(self, act: Callable[[], None]) -> None:
        """Have ``act`` called, in a thread of its own, when this rank begins to end the job."""
        self._before_end.append(act)

    def forget(self, act: Callable[[], None]) -> None:
        """Undo :meth:`before_end`."""
        if act in self._before_end:
            self._before_end.remove(act)

    def fail(self, reason: str, code: int = EXIT_CODE, waiting: Call | None = None) -> NoReturn:
        """Have the report headed ``reason`` written, and end the job with ``code``. From any thread."""
        for act in self._before_end:  # what it does on a GPU that hangs must not keep the report back
            threading.Thread(target=act, daemon=True).start()
        group = self._groups.get(waiting.group, ()) if waiting is not None else ()
        self.reporter.fail(reason, code, waiting, group)

    def survey(self) -> str:
        """Describe where every rank of the job is, without ending anything. From any thread."""
        return self.reporter.survey()

    def mark_failing(self) -> None:
        """Say that this rank is about to end the job, so that it does not count as waiting or dead."""
        self._board.set_state(FAILING)

    # -- the thread ------------------------------------------------------------------------------------------

    def _watch(self) -> None:
        neighbour = self._watch_neighbour()
        poll = select.poll()
        if neighbour is not None:
            poll.register(neighbour[1], select.POLLIN)
        while True:
            for file, _ in poll.poll(POLL_MS):
                poll.unregister(file)
                assert neighbour is not None
                self._on_neighbour_death(neighbour[0])
            own = self._board.read(self._board.local_rank)
            if own.state == INSIDE and own.call is not None and own.age > own.call.seconds:
                self.fail(f"{own.call}: not finished after {own.call.seconds:g} s", waiting=own.call)

    def _watch_neighbour(self) -> tuple[int, int] | None:
        """Watch the node's next rank by its lock, or return its local rank and a file to poll."""
        board, ranks = self._board, self.reporter.ranks
        if not board.shared or board.size == 1:
            return None
        local_rank = (board.local_rank + 1) % board.size
        if ranks[self.reporter.rank].has_death_lock and ranks[self._world_rank(local_rank)].has_death_lock:
            self._death_lock.watch(
                local_rank * ROW_BYTES + LOCK, lambda: self._on_neighbour_death(local_rank)
            )
            return None
        with suppress(OSError, AttributeError):  # an older kernel, or a Python made for one
            return local_rank, os.pidfd_open(board.read(local_rank).pid)
        return None

    def _world_rank(self, local_rank: int) -> int:
        ranks = self.reporter.ranks
        own = self.reporter.ranks_of_node(ranks[self.reporter.rank].node)
        return next(r for r in own if ranks[r].local_rank == local_rank)

    def _on_neighbour_death(self, local_rank: int) -> None:
        """Report the death of a rank of this node, unless its program ended in order.

        A rank that ended by itself, or that was failing, gets a moment to report first.
        """
        entry, rank = self._board.read(local_rank), self._world_rank(local_rank)
        if entry.state == LEFT:
            return
        cause = stack_dump.exit_cause(entry.pid)
        host = self.reporter.ranks[self.reporter.rank].host
        reason = f"the process of rank {rank} on {host} has ended without a word: {cause.text}"
        if not cause.by_signal or entry.state == FAILING:
            time.sleep(GRACE_S)
            self.fail(reason)
        self.reporter.fail_in_haste(reason, EXIT_CODE, dead=rank)
