"""A pytest session that spans the ranks of an MPI job: one verdict and one report for each test, and a
deadline.

Every rank runs the same tests in the same order. After each phase of a test the ranks compare what happened
on a communicator of their own, so that a test that failed anywhere fails everywhere, with the traceback of
the rank that failed, and no rank enters the next phase alone. A test that passes its deadline ends the job:
the ranks that still wait print where, and exit.
"""

import faulthandler
import os
import threading
import time
from collections.abc import Generator
from dataclasses import dataclass
from typing import Any

import pytest
from mpi4py import MPI

DEADLINE_S = 60.0
# How long a failed rank waits for the others before it prints its traceback by itself.
GRACE_S = 5.0


@dataclass(frozen=True)
class Headline:
    """What pytest's summary says of a failure; pytest prints a plain text there in full."""

    message: str


@dataclass(frozen=True)
class Verdict:
    """What the ranks saw, in the form that pytest takes for a traceback."""

    text: str
    reprcrash: Headline

    def __str__(self) -> str:
        return self.text

    def toterminal(self, writer: Any) -> None:
        writer.line(self.text)


@dataclass(frozen=True)
class Account:
    """What one rank saw of one phase of a test: a headline, the traceback and the captured output."""

    outcome: str
    headline: str
    text: str
    output: str

    @classmethod
    def of(cls, report: pytest.TestReport) -> "Account":
        crash = getattr(report.longrepr, "reprcrash", None)
        headline = crash.message.partition("\n")[0] if crash else report.outcome
        text = report.longreprtext if report.failed else f"{report.outcome} {report.longreprtext}"
        output = "\n".join(f"{name}\n{shown}" for name, shown in report.sections)
        return cls(report.outcome, headline, text, output)


class MPISession:
    """The pytest plugin of a ``--with-mpi`` run."""

    def __init__(self) -> None:
        self.comm = MPI.COMM_WORLD.Dup()
        self._stderr = os.fdopen(os.dup(2), "w")  # capture replaces descriptor 2 while a test runs
        self._collect_errors: list[str] = []

    def num_nodes(self) -> int:
        """Groups of ranks that share memory, as MPI sees them; collective."""
        node = self.comm.Split_type(MPI.COMM_TYPE_SHARED)
        leaders = self.comm.allreduce(int(node.rank == 0))
        node.Free()
        return leaders

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
        # The alarm's thread needs the interpreter lock; this one also ends a rank that never gives the lock
        # back.
        faulthandler.dump_traceback_later(deadline(item) + 5, exit=True, file=self._stderr)

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_makereport(
        self, item: pytest.Item
    ) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        report = yield
        if self.comm.size > 1:
            self._wait_for_all(report)
            agree(report, self.comm.allgather(Account.of(report)))
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


def agree(report: pytest.TestReport, accounts: list[Account]) -> None:
    """Make ``report`` the verdict of all ranks: failed if any failed, or if they do not agree."""
    failed = [account.outcome == "failed" for account in accounts]
    if not any(failed):
        if len({account.outcome for account in accounts}) == 1:
            return
        failed = [True] * len(accounts)
    alike: dict[str, list[int]] = {}
    for rank in (rank for rank, bad in enumerate(failed) if bad):
        alike.setdefault(accounts[rank].text, []).append(rank)
    named = [("rank " + ", ".join(map(str, ranks)), accounts[ranks[0]]) for ranks in alike.values()]
    # The report shows rank 0's output as its own.
    output = [
        f"rank {rank}: {accounts[rank].output}" for rank in range(1, len(accounts)) if accounts[rank].output
    ]
    report.outcome = "failed"
    report.longrepr = Verdict(  # type: ignore[assignment]  # pytest's own base class is private
        "\n".join([*(f"{ranks}:\n{account.text}" for ranks, account in named), *output]),
        Headline("; ".join(f"{ranks}: {account.headline}" for ranks, account in named)),
    )


def difference(found: list[tuple[list[str], list[str]]]) -> str:
    """Name, for each rank, the tests that not all ranks have, and its collection errors."""
    common = set.intersection(*(set(names) for names, _ in found))
    lines = []
    for rank, (names, errors) in enumerate(found):
        own = [name for name in names if name not in common]
        lines += [f"rank {rank}: {len(names)} tests; not on all ranks: {own[:5]}", *errors]
    return "\n".join(lines)
