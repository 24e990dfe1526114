"""A pytest session that spans the ranks of an MPI job: one verdict and one report for each test, and a deadline.

Every rank runs the same tests in the same order. After each phase of a test the ranks compare what happened on a
communicator of their own, so that a test that failed anywhere fails everywhere, with the traceback of the rank that
failed, and no rank enters the next phase alone. A test that passes its deadline ends the job: the ranks that still
wait print where, and exit.
"""

import faulthandler
import os
import threading
import time
from collections.abc import Generator

import pytest
from mpi4py import MPI

DEADLINE_S = 60.0
# How long a failed rank waits for the others before it prints its traceback by itself.
GRACE_S = 5.0


class MPISession:
    """The pytest plugin of a ``--with-mpi`` run."""

    def __init__(self) -> None:
        self.comm = MPI.COMM_WORLD.Dup()
        self._stderr = os.fdopen(os.dup(2), "w")  # capture replaces descriptor 2 while a test runs
        self._collect_errors: list[str] = []

    @pytest.hookimpl(trylast=True)
    def pytest_configure(self, config: pytest.Config) -> None:
        if self.comm.rank:
            config.pluginmanager.unregister(name="terminalreporter")

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self._collect_errors.append(report.longreprtext)

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        names = [item.nodeid for item in session.items]
        found = self.comm.allgather((names, self._collect_errors))
        if any(other != found[0] for other in found):
            raise pytest.exit(f"ranks collected different tests\n{difference(found)}", returncode=1)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Generator[None, object, object]:
        seconds = deadline(item)
        alarm = threading.Timer(seconds, self._give_up, (item.nodeid, seconds))
        alarm.daemon = True
        alarm.start()
        try:
            return (yield)
        finally:
            alarm.cancel()
            faulthandler.cancel_dump_traceback_later()

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        # The alarm's thread needs the interpreter lock; this one also ends a rank that never gives the lock back.
        faulthandler.dump_traceback_later(deadline(item) + 5, exit=True, file=self._stderr)

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_makereport(
        self, item: pytest.Item
    ) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        report = yield
        if self.comm.size > 1:
            self._wait_for_all(report)
            agree(report, self.comm.allgather((report.outcome, self._account(report))))
        return report

    def pytest_unconfigure(self) -> None:
        self.comm.Barrier()  # rank 0 finishes its report before a non-zero exit aborts the job

    def _wait_for_all(self, report: pytest.TestReport) -> None:
        arrived = self.comm.Ibarrier()
        limit = time.monotonic() + GRACE_S
        while report.failed and time.monotonic() < limit and not arrived.Test():
            time.sleep(0.001)
        if report.failed and not arrived.Test():
            text = f"failed in {report.when} while other ranks have not come so far:\n{report.longreprtext}"
            self._say(f"{report.nodeid} {text}")
        arrived.Wait()

    def _account(self, report: pytest.TestReport) -> str:
        """What the others need to know of this rank: rank 0's report shows its own captured output anyway."""
        if report.passed:
            return ""
        sections = report.sections if self.comm.rank and report.failed else []
        return "\n".join([report.longreprtext, *(f"--- {name} ---\n{text}" for name, text in sections)])

    def _give_up(self, nodeid: str, seconds: float) -> None:
        self._say(f"{nodeid} not finished after its deadline of {seconds:g} s; the stack of every thread:")
        faulthandler.dump_traceback(self._stderr)
        time.sleep(1)  # the first exit ends the whole job: let the other ranks print theirs
        os._exit(1)

    def _say(self, text: str) -> None:
        self._stderr.write(f"\nrank {self.comm.rank} of {self.comm.size}: {text}\n")
        self._stderr.flush()


def deadline(item: pytest.Item) -> float:
    """Seconds that ``item`` may take: its ``mpi(deadline=…)``, or the default."""
    mark = item.get_closest_marker("mpi")
    return float(mark.kwargs.get("deadline", DEADLINE_S)) if mark else DEADLINE_S


def agree(report: pytest.TestReport, accounts: list[tuple[str, str]]) -> None:
    """Make ``report`` the verdict of all ranks; ``accounts`` holds (outcome, text) of each."""
    outcomes = {outcome for outcome, _ in accounts}
    if outcomes == {report.outcome} and report.outcome != "failed":
        return
    if "failed" not in outcomes:
        accounts = [(outcome, f"{outcome} {text}") for outcome, text in accounts]
    ranks_of: dict[str, list[int]] = {}
    for rank, (outcome, text) in enumerate(accounts):
        if outcome == "failed" or "failed" not in outcomes:
            ranks_of.setdefault(text, []).append(rank)
    report.outcome = "failed"
    report.longrepr = "\n".join(
        f"rank {', '.join(map(str, ranks))}:\n{text}" for text, ranks in ranks_of.items()
    )


def difference(found: list[tuple[list[str], list[str]]]) -> str:
    """Name, for each rank, the tests that not all ranks have, and its collection errors."""
    common = set.intersection(*(set(names) for names, _ in found))
    lines = []
    for rank, (names, errors) in enumerate(found):
        own = [name for name in names if name not in common]
        lines += [f"rank {rank}: {len(names)} tests; not on all ranks: {own[:5]}", *errors]
    return "\n".join(lines)
