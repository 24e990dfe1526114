"""Questions between the nodes of a job, over TCP: MPI cannot carry them while its collectives stand still."""

import socket
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client, Listener
from typing import Any

ASK_S = 3.0
"""How long an answer is waited for."""


@dataclass(frozen=True)
class Address:
    """Where a rank listens: its node's addresses, the first that works is taken, and a port."""

    hosts: tuple[str, ...]
    port: int


class NodeServer:
    """Answers questions of those that know ``key``, in a thread of its own that sleeps until one comes."""

    def __init__(self, key: bytes, answer: Callable[[Any], Any]) -> None:
        self._answer = answer
        self._listener = Listener(("0.0.0.0", 0), "AF_INET", authkey=key)
        self.address = Address(_own_hosts(), int(self._listener.address[1]))
        threading.Thread(target=self._serve, name="xpar-guard-ear", daemon=True).start()

    def _serve(self) -> None:
        while True:
            # Whoever does not know the key, or goes away, is no reason to stop listening.
            with suppress(OSError, EOFError, AuthenticationError), self._listener.accept() as line:
                line.send(self._answer(line.recv()))


def ask_node(addresses: Sequence[Address], key: bytes, question: Any) -> list[Any]:
    """The answer from each address, None where there was none in time; all are asked at once."""
    answers: list[Any] = [None] * len(addresses)

    def one(place: int) -> None:
        for host in addresses[place].hosts:
            with (
                suppress(OSError, EOFError, AuthenticationError),
                Client((host, addresses[place].port), "AF_INET", authkey=key) as line,
            ):
                line.send(question)
                answers[place] = line.recv()
                return

    threads = [threading.Thread(target=one, args=(place,), daemon=True) for place in range(len(addresses))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(ASK_S)
    return answers


def _own_hosts() -> tuple[str, ...]:
    """This machine's addresses as others may reach it, the one of the default route first."""
    found = []
    with suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(("192.0.2.1", 9))  # sends nothing: only a route is looked up
        found.append(probe.getsockname()[0])
    with suppress(OSError):
        found += [str(info[4][0]) for info in socket.getaddrinfo(socket.gethostname(), None, socket.AF_INET)]
    return tuple(dict.fromkeys(found or ["127.0.0.1"]))
