"""A thread that sees a collective pass its deadline or a neighbour die, has one report written, and ends the job."""

import atexit
import os
import secrets
import select
import signal
import socket
import sys
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
from xpar.comm.watchdog.journal import BoardJournal, Pace
from xpar.comm.watchdog.places import RankAddress, SurveyRequest
from xpar.comm.watchdog.report import RankState, format_body, format_head, format_rank
from xpar.comm.watchdog.status_board import FAILING, INSIDE, LEFT, LOCK, OUTSIDE, ROW_BYTES, Call, StatusBoard
from xpar.comm.watchdog.wire import NodeServer, ask_node

if TYPE_CHECKING:
    from mpi4py import MPI

CODE = 17
TERMINATED = 128 + signal.SIGTERM
"""Exit code of a rank that was told to end, as a shell gives it."""
LOOK_MS = 250
"""Between two looks at this rank's own row."""
GRACE_S = 1.0
"""Where a process has ended by itself, that rank, or a launcher that ends the job, has this long to say why."""
LAST_RESORT_S = 3.0
"""So long after the report MPI_Abort may take; then a node ends its ranks by itself, those that are stopped, too.

Not every launcher passes an abort on to the other nodes while their ranks are outside MPI.
"""
PATIENCE_S = 10.0
"""How long a rank waits to be ended when another one reports."""


@dataclass(frozen=True)
class Watching:
    """``compares``: every collective is compared on all ranks before it begins (``--debug-collectives``).

    ``keeps_waits``: every group's journal keeps how long each collective waited, for a report about stragglers.
    """

    compares: bool = False
    keeps_waits: bool = False


WATCHING = Watching()


class Watchdog:
    """One for each rank of a job of several. ``abort``: ends the whole job with a code, from any thread.

    The report is written once: by the first rank of the first node that sees something wrong, or, where another node
    sees it first, by a rank of the first node on its behalf.
    """

    def __init__(
        self,
        board: StatusBoard,
        rank: int,
        deadlines: Deadlines,
        watching: Watching,
        abort: Callable[[int], None],
    ) -> None:
        self.board, self.rank, self.deadlines, self.watching, self.abort = (
            board,
            rank,
            deadlines,
            watching,
            abort,
        )
        self.pace = Pace(deadlines)
        self._journals: list[BoardJournal] = []
        self.places: tuple[RankAddress, ...] = ()
        self._groups: dict[str, tuple[int, ...]] = {}
        self._key = b""
        board.introduce(stack_dump.register_stack_dump())
        self._wire = DeathLock(board.memory, board.mine * ROW_BYTES + LOCK)

    @classmethod
    def start(
        cls,
        world: "MPI.Comm",
        node: "MPI.Comm",
        node_of: Sequence[int],
        deadlines: Deadlines,
        watching: Watching = WATCHING,
    ) -> "Watchdog":
        """Collective over ``world``, the job's ranks; ``node``: those of this rank's node; ``node_of``: of each rank."""
        guard = cls(StatusBoard.open(node), world.rank, deadlines, watching, world.Abort)
        guard._key = world.bcast(secrets.token_bytes(16) if world.rank == 0 else None, root=0)
        address = None
        if max(node_of):
            with suppress(OSError):  # a node that cannot be asked is reported as one that does not answer
                address = NodeServer(guard._key, guard._answer).address
        mine = RankAddress(socket.gethostname(), node_of[world.rank], node.rank, address, guard._wire.hold())
        guard.places = tuple(world.allgather(mine))
        atexit.register(board_left, guard.board)
        threading.Thread(target=guard._watch, name="xpar-guard", daemon=True).start()
        return guard

    def journal(self, group: str, world_ranks: Sequence[int]) -> BoardJournal:
        """For the communicator of a group."""
        self._groups[group] = tuple(world_ranks)
        waits = array("d") if self.watching.keeps_waits else None
        journal = BoardJournal(self.board, group, self.pace, self.watching.compares, waits)
        self._journals.append(journal)
        return journal

    def take_waits(self) -> dict[tuple[str, tuple[int, ...]], list[float]]:
        """Name and ranks of each group -> the seconds of its collectives since the last call, where they are kept."""
        taken = {}
        for journal in self._journals:
            if journal.waits is not None:
                taken[journal.group, self._groups[journal.group]] = journal.waits.tolist()
                del journal.waits[:]
        return taken

    def fail(self, reason: str, code: int = CODE, waiting: Call | None = None) -> NoReturn:
        """Have the job's report written, once, headed ``reason``, and end the job on every rank. From any thread."""
        group = self._groups.get(waiting.group, ()) if waiting is not None else ()
        self._fail(SurveyRequest(self._headed(reason), code, waiting, group))

    def told_to_end(self) -> NoReturn:
        """SIGTERM has come, perhaps since another rank died: say where every rank is before a SIGKILL follows."""
        if self.board.read(self.board.mine).state == LEFT:
            os._exit(TERMINATED)
        here = tuple(self._here(asking=False))
        self._fail(SurveyRequest(self._headed("told to end by SIGTERM"), TERMINATED, brought=here))

    def _headed(self, reason: str) -> str:
        return f"[rank {self.rank} on {self.places[self.rank].host}] {reason}"

    def _fail(self, q: SurveyRequest) -> NoReturn:
        code = CODE if q.code is None else q.code
        if self._delegate(q):
            self._await_report(code, LAST_RESORT_S)
            self._end_node(code)
        if self.board.claim():
            self._report(q)
        self._await_report(code, PATIENCE_S)  # another rank reports, and ends this one
        os._exit(code)

    def _await_report(self, code: int, seconds: float) -> None:
        """Sleep ``seconds``; a rank that was told to end goes as soon as it is not needed any more."""
        limit = time.monotonic() + seconds
        while time.monotonic() < limit:
            time.sleep(0.2)
            if code == TERMINATED and self.board.reported():
                time.sleep(0.2)  # an answer may be on its way
                os._exit(code)

    def survey(self) -> str:
        """Where every rank of the job is, in words, as the report has it; ends nothing. From any thread."""
        return format_rank(*self._survey(SurveyRequest()))

    def failing(self) -> None:
        """This rank is about to end the job by itself: it is not taken for one that waits or has died."""
        self.board.set_state(FAILING)

    # -- the thread ------------------------------------------------------------------------------------------

    def _watch(self) -> None:
        neighbour = self._feel()
        poll = select.poll()
        if neighbour is not None:
            poll.register(neighbour[1], select.POLLIN)
        while True:
            for file, _ in poll.poll(LOOK_MS):
                poll.unregister(file)
                assert neighbour is not None
                self._miss(neighbour[0])
            mine = self.board.read(self.board.mine)
            if mine.state == INSIDE and mine.call is not None and mine.age > mine.call.seconds:
                self.fail(f"{mine.call}: not finished after {mine.call.seconds:g} s", waiting=mine.call)

    def _feel(self) -> tuple[int, int] | None:
        """Look after the next rank of the node: by its lock, or else by (local rank, descriptor of its process)."""
        if not self.board.shared or self.board.size == 1:
            return None
        local = (self.board.mine + 1) % self.board.size
        if self.places[self.rank].armed and self.places[self._rank_at(local)].armed:
            self._wire.watch(local * ROW_BYTES + LOCK, lambda: self._miss(local))
            return None
        with suppress(OSError, AttributeError):  # an older kernel, or a Python made for one
            return local, os.pidfd_open(self.board.read(local).pid)
        return None

    def _rank_at(self, local: int) -> int:
        own = self._node_ranks(self.places[self.rank].node)
        return next(r for r in own if self.places[r].local_rank == local)

    def _miss(self, local: int) -> None:
        """The process of a rank of this node has ended: in order, in a failure that it reports itself, or killed."""
        entry, rank = self.board.read(local), self._rank_at(local)
        if entry.state == LEFT:
            return
        end = stack_dump.exit_cause(entry.pid)
        reason = (
            f"the process of rank {rank} on {self.places[rank].host} has ended without a word: {end.text}"
        )
        if not end.by_signal or entry.state == FAILING:
            time.sleep(GRACE_S)
            self.fail(reason)
        self._fail(
            SurveyRequest(self._headed(reason), CODE, brought=tuple(self._here(asking=False, dead=rank)))
        )

    # -- the report ------------------------------------------------------------------------------------------

    def _report(self, q: SurveyRequest) -> NoReturn:
        code = CODE if q.code is None else q.code
        begun = list(q.brought)
        if begun:  # the launcher may end this process any moment: what is known goes first
            begun += [] if self.rank in {s.rank for s in begun} else self._here(asking=False)
            self._write(f"{q.reason}; {format_head(begun)}")
        seen, silent = self._survey(SurveyRequest(code=code))
        rest = (
            format_body(begun, seen, silent)
            if begun
            else f"{q.reason}; {format_rank(seen, silent, q.waiting, q.group)}"
        )
        self._write(f"{rest}\nending the job on every rank".lstrip("\n"))
        self.board.set_reported()
        self._end_later(code)
        time.sleep(0.3)  # lets the launcher collect what was written
        if code != TERMINATED:
            self.abort(code)
            time.sleep(PATIENCE_S)
        os._exit(code)

    def _write(self, text: str) -> None:
        sys.stdout.flush()
        sys.stderr.write(f"{text}\n")
        sys.stderr.flush()

    def _end_later(self, code: int) -> None:
        last = threading.Timer(LAST_RESORT_S, self._end_node, (code,))
        last.daemon = True
        last.start()

    def _end_node(self, code: int) -> NoReturn:
        """End every process of this node that is a rank of the job, this one last."""
        for local in range(self.board.size if self.board.shared else 0):
            entry = self.board.read(local)
            if local != self.board.mine and entry.state != LEFT:
                with suppress(OSError):
                    os.kill(entry.pid, signal.SIGKILL)
        os._exit(code)

    def _survey(self, q: SurveyRequest) -> tuple[list[RankState], list[tuple[int, str]]]:
        """What is known of the ranks of every node that answers, and (rank, host) of the others."""
        own = self.places[self.rank].node
        others = sorted({p.node for p in self.places} - {own})
        answers: dict[int, list[RankState] | None] = dict.fromkeys(others)
        threads = [threading.Thread(target=self._ask_node, args=(n, q, answers), daemon=True) for n in others]
        for thread in threads:
            thread.start()
        here = self._here()
        for thread in threads:
            thread.join()
        answers[own] = here
        seen = [s for part in answers.values() if part is not None for s in part]
        known = {s.rank for s in seen}
        return seen, [(r, p.host) for r, p in enumerate(self.places) if r not in known]

    def _ask_node(self, node: int, q: SurveyRequest, answers: dict[int, list[RankState] | None]) -> None:
        for rank in self._node_ranks(node)[:2]:
            answers[node] = self._ask(rank, q)
            if answers[node] is not None:
                return

    def _here(self, asking: bool = True, dead: int = -1) -> list[RankState]:
        """The ranks of this node; where they share no board, this rank. ``asking``: for their stacks, too, which takes a
        moment. ``dead``: a rank whose process is known to be about to go."""
        ranks = self._node_ranks(self.places[self.rank].node) if self.board.shared else [self.rank]
        entries = [self.board.read(self.places[r].local_rank) for r in ranks]
        texts = stack_dump.collect_stacks(
            (e.pid, e.stack_fd if asking and e.state in (INSIDE, OUTSIDE) else -1) for e in entries
        )
        states = [stack_dump.process_state(e.pid) if e.state != LEFT else "" for e in entries]
        return [
            RankState(
                rank, self.places[rank].host, e.state, e.age, e.call, "gone" if rank == dead else state, text
            )
            for rank, e, state, text in zip(ranks, entries, states, texts, strict=True)
        ]

    # -- between nodes -----------------------------------------------------------------------------------------

    def _delegate(self, q: SurveyRequest) -> bool:
        """Let the first node report; False on that node itself, or if it does not answer."""
        if self.places[self.rank].node == 0:
            return False
        return any(self._ask(rank, q) is not None for rank in self._node_ranks(0)[:2])

    def _ask(self, rank: int, q: SurveyRequest) -> list[RankState] | None:
        address = self.places[rank].address
        if address is None:
            return None
        answer: list[RankState] | None = ask_node([address], self._key, q)[0]
        return answer

    def _answer(self, q: SurveyRequest) -> list[RankState]:
        """What this rank says to another node's ``q``; if the job is to end, nobody of this node reports by itself then."""
        if q.code is None:
            return self._here()
        first = self.board.claim()
        if not q.reason:
            here = self._here()
            self.board.set_reported()
            self._end_later(q.code)
            return here
        if first:
            threading.Thread(target=self._report, args=(q,), daemon=True).start()
        return []

    def _node_ranks(self, node: int) -> list[int]:
        return [r for r, p in enumerate(self.places) if p.node == node]


def board_left(board: StatusBoard) -> None:
    """The program has come to its end on this rank: its process may go."""
    board.set_state(LEFT)
