"""The report of where every rank is, written once, and the end of the job after it."""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import NoReturn

from xpar.comm.watchdog import stack_dump
from xpar.comm.watchdog.node_service import RankAddress, SurveyRequest, ask_node
from xpar.comm.watchdog.report import RankState, format_body, format_head, format_survey
from xpar.comm.watchdog.status_board import INSIDE, LEFT, OUTSIDE, Call, StatusBoard

EXIT_CODE = 17
"""exit code of a job that the watchdog ends"""
TERMINATED = 128 + signal.SIGTERM
"""exit code of a rank that was ended by SIGTERM, as a shell gives it"""
ABORT_S = 3.0
"""seconds that MPI_Abort may take after the report. Then each node ends its own ranks, stopped ones too: not
every launcher passes an abort on to the other nodes while their ranks are outside MPI."""
PATIENCE_S = 10.0
"""seconds for which a rank waits to be ended when another rank reports"""
RANKS_ASKED = 2
"""ranks of another node that are asked before the node counts as silent"""


class Reporter:
    """Surveys all ranks, writes the report and ends the job by ``abort``, from any thread.

    The report is written by the first rank of the first node that asks for one. A rank of another node has a
    rank of the first node write it, if any answers.
    """

    def __init__(self, board: StatusBoard, rank: int, abort: Callable[[int], None]) -> None:
        self.board, self.rank, self._abort = board, rank, abort
        self.ranks: tuple[RankAddress, ...] = ()
        self._key = b""

    def connect(self, key: bytes, ranks: tuple[RankAddress, ...]) -> None:
        """Set the job's secret and all ranks' addresses, which are known last."""
        self._key, self.ranks = key, ranks

    def survey(self) -> str:
        """Describe where every rank of the job is, without ending anything. From any thread."""
        return format_survey(*self._survey(SurveyRequest()))

    def fail(
        self, reason: str, code: int, waiting: Call | None = None, group: tuple[int, ...] = ()
    ) -> NoReturn:
        """Have the report headed ``reason`` written, and end the job with ``code``. From any thread.

        ``waiting``: the collective of world ranks ``group`` that did not end in time, if that is the reason.
        """
        self._end(SurveyRequest(self._headline(reason), code, waiting, group))

    def fail_in_haste(self, reason: str, code: int, dead: int = -1) -> NoReturn:
        """Report as :meth:`fail`, but the states of this node's ranks at once: a launcher may kill them.

        ``dead``: a rank whose process is known to be ending.
        """
        states = tuple(self._survey_node(with_stacks=False, dead=dead))
        self._end(SurveyRequest(self._headline(reason), code, known_states=states))

    def end_on_sigterm(self) -> NoReturn:
        """End the job in haste after SIGTERM, since a SIGKILL may follow."""
        if self.board.read(self.board.local_rank).state == LEFT:
            os._exit(TERMINATED)
        self.fail_in_haste("told to end by SIGTERM", TERMINATED)

    def answer(self, request: SurveyRequest) -> list[RankState]:
        """Answer a rank of another node, which asks for the states of this node's ranks.

        Three requests come here. Without ``code`` the other node only wants to know. With ``code`` the job
        is to end: without ``reason`` the other node reports, and this one ends its ranks soon after the
        answer; with ``reason`` this node is the first one, and writes the report for the other.
        """
        if request.code is None:
            return self._survey_node()
        is_first = self.board.claim_report()
        if not request.reason:
            states = self._survey_node()
            self.board.set_reported()
            self._end_node_later(request.code)
            return states
        if is_first:
            threading.Thread(target=self._report, args=(request,), daemon=True).start()
        return []

    def _headline(self, reason: str) -> str:
        return f"[rank {self.rank} on {self.ranks[self.rank].host}] {reason}"

    # -- who reports
    # ---------------------------------------------------------------------------------------------

    def _end(self, request: SurveyRequest) -> NoReturn:
        code = EXIT_CODE if request.code is None else request.code
        if self._delegate(request):
            self._await_report(code, ABORT_S)
            self._end_node(code)
        if self.board.claim_report():
            self._report(request)
        self._await_report(code, PATIENCE_S)  # another rank reports, and ends this one
        os._exit(code)

    def _delegate(self, request: SurveyRequest) -> bool:
        """Have the first node report; False on that node itself, or if it does not answer."""
        if self.ranks[self.rank].node == 0:
            return False
        return any(self._ask(rank, request) is not None for rank in self.ranks_of_node(0)[:RANKS_ASKED])

    def _await_report(self, code: int, seconds: float) -> None:
        """Sleep ``seconds``. After SIGTERM, end this process as soon as the report is written."""
        limit = time.monotonic() + seconds
        while time.monotonic() < limit:
            time.sleep(0.2)
            if code == TERMINATED and self.board.is_reported():
                time.sleep(0.2)  # an answer to another node may be on its way
                os._exit(code)

    # -- the report ------------------------------------------------------------------------------------------

    def _report(self, request: SurveyRequest) -> NoReturn:
        """Write the report and end the job."""
        code = EXIT_CODE if request.code is None else request.code
        in_head = list(request.known_states)
        if in_head:  # the launcher may end this process any moment: what is known goes first
            in_head += [] if self.rank in {s.rank for s in in_head} else self._survey_node(with_stacks=False)
            self._write(f"{request.reason}; {format_head(in_head)}")
        seen, silent = self._survey(SurveyRequest(code=code))
        rest = (
            format_body(in_head, seen, silent)
            if in_head
            else f"{request.reason}; {format_survey(seen, silent, request.waiting, request.group)}"
        )
        self._write(f"{rest}\nending the job on every rank".lstrip("\n"))
        self.board.set_reported()
        self._end_node_later(code)
        time.sleep(0.3)  # lets the launcher collect what was written
        if code != TERMINATED:
            self._abort(code)
            time.sleep(PATIENCE_S)
        os._exit(code)

    def _write(self, text: str) -> None:
        sys.stdout.flush()
        sys.stderr.write(f"{text}\n")
        sys.stderr.flush()

    def _end_node_later(self, code: int) -> None:
        timer = threading.Timer(ABORT_S, self._end_node, (code,))
        timer.daemon = True
        timer.start()

    def _end_node(self, code: int) -> NoReturn:
        """End every process of this node that is a rank of the job, this one last."""
        for local_rank in range(self.board.size if self.board.shared else 0):
            entry = self.board.read(local_rank)
            if local_rank != self.board.local_rank and entry.state != LEFT:
                with suppress(OSError):
                    os.kill(entry.pid, signal.SIGKILL)
        os._exit(code)

    # -- the survey ------------------------------------------------------------------------------------------

    def _survey(self, request: SurveyRequest) -> tuple[list[RankState], list[tuple[int, str]]]:
        """Ask every node where its ranks are: the states that come, and rank and host of the others."""
        own = self.ranks[self.rank].node
        others = sorted({r.node for r in self.ranks} - {own})
        answers: dict[int, list[RankState] | None] = dict.fromkeys(others)

        def ask(node: int) -> None:
            for rank in self.ranks_of_node(node)[:RANKS_ASKED]:
                answers[node] = self._ask(rank, request)
                if answers[node] is not None:
                    return

        threads = [threading.Thread(target=ask, args=(node,), daemon=True) for node in others]
        for thread in threads:
            thread.start()
        own_states = self._survey_node()
        for thread in threads:
            thread.join()
        answers[own] = own_states
        seen = [s for states in answers.values() if states is not None for s in states]
        known = {s.rank for s in seen}
        return seen, [(rank, r.host) for rank, r in enumerate(self.ranks) if rank not in known]

    def _survey_node(self, with_stacks: bool = True, dead: int = -1) -> list[RankState]:
        """Return the states of this node's ranks, or of this rank alone if the board is not shared.

        ``with_stacks``: collect the stacks, too, which takes a moment. ``dead``: a rank that is ending.
        """
        ranks = self.ranks_of_node(self.ranks[self.rank].node) if self.board.shared else [self.rank]
        entries = [self.board.read(self.ranks[r].local_rank) for r in ranks]
        texts = stack_dump.collect_stacks(
            (e.pid, e.stack_fd if with_stacks and e.state in (INSIDE, OUTSIDE) else -1) for e in entries
        )
        states = [stack_dump.process_state(e.pid) if e.state != LEFT else "" for e in entries]
        return [
            RankState(
                rank, self.ranks[rank].host, e.state, e.age, e.call, "gone" if rank == dead else state, text
            )
            for rank, e, state, text in zip(ranks, entries, states, texts, strict=True)
        ]

    def _ask(self, rank: int, request: SurveyRequest) -> list[RankState] | None:
        address = self.ranks[rank].address
        return None if address is None else ask_node(address, self._key, request)

    def ranks_of_node(self, node: int) -> list[int]:
        """Return the world ranks of a node."""
        return [rank for rank, r in enumerate(self.ranks) if r.node == node]
