"""Questions from node to node of a job over TCP. MPI cannot carry them while its collectives stand still."""

import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client, Listener

from xpar.comm.watchdog.report import RankState
from xpar.comm.watchdog.status_board import Call

ANSWER_S = 3.0
"""seconds for which an answer is waited for"""


@dataclass(frozen=True)
class Address:
    """The address of a node server: its machine's addresses, of which one works, and a port."""

    hosts: tuple[str, ...]
    port: int


@dataclass(frozen=True)
class RankAddress:
    """The host, node and index on it, by which other ranks find a rank of the job.

    ``address``: of its node server; None in a job of one node. ``has_death_lock``: whether its neighbour can
    learn of its death by a :class:`~xpar.comm.watchdog.death_lock.DeathLock`.
    """

    host: str
    node: int
    local_rank: int
    address: Address | None
    has_death_lock: bool


@dataclass(frozen=True)
class SurveyRequest:
    """A question to a rank of another node about the ranks there.

    Attributes:
        reason: If not empty, the other node is to write the report with this headline and to end the job.
        code: If given, the job ends with this exit code after the answer.
        waiting: The collective that did not end in time, if that is the reason.
        group: The world ranks of that collective's group.
        known_states: States of ranks of a node that may not live to be asked later.
    """

    reason: str = ""
    code: int | None = None
    waiting: Call | None = None
    group: tuple[int, ...] = ()
    known_states: tuple[RankState, ...] = ()


class NodeServer:
    """A thread that answers :class:`SurveyRequest` from processes that know ``key``."""

    def __init__(self, key: bytes, answer: Callable[[SurveyRequest], list[RankState]]) -> None:
        self._answer = answer
        self._listener = Listener(("0.0.0.0", 0), "AF_INET", authkey=key)
        self.address = Address(_own_hosts(), int(self._listener.address[1]))
        threading.Thread(target=self._serve, name="xpar-watchdog-node-server", daemon=True).start()

    def _serve(self) -> None:
        while True:
            # A client that does not know the key, or that goes away, is no reason to stop listening.
            with suppress(OSError, EOFError, AuthenticationError), self._listener.accept() as connection:
                connection.send(self._answer(connection.recv()))


def ask_node(address: Address, key: bytes, request: SurveyRequest) -> list[RankState] | None:
    """Return the answer of a node server with the job's ``key``; None after ANSWER_S."""
    answers: list[list[RankState]] = []

    def ask() -> None:
        for host in address.hosts:
            with (
                suppress(OSError, EOFError, AuthenticationError),
                Client((host, address.port), "AF_INET", authkey=key) as connection,
            ):
                connection.send(request)
                answers.append(connection.recv())
                return

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(ANSWER_S)
    return answers[0] if answers else None


def _own_hosts() -> tuple[str, ...]:
    """Return this machine's addresses for other machines, the default route's first."""
    found = []
    with suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(("192.0.2.1", 9))  # sends nothing: only a route is looked up
        found.append(probe.getsockname()[0])
    with suppress(OSError):
        found += [str(info[4][0]) for info in socket.getaddrinfo(socket.gethostname(), None, socket.AF_INET)]
    return tuple(dict.fromkeys(found or ["127.0.0.1"]))
