"""A trial exchange over peer memory by the real kernels, compared on every rank."""

from typing import TYPE_CHECKING, Protocol

import torch

from xpar.comm.communicator import Communicator
from xpar.comm.failure import agreed
from xpar.comm.watchdog.deadlines import Deadlines
from xpar.kernels.gpu.limits import layer_of

if TYPE_CHECKING:
    from xpar.kernels.gpu.one_sided import Peers

WIDTH = 64
"""Values of a row of the trial."""
KINDS = 2
"""Kinds of exchanges: rows of tokens, results."""
TURNS_A_SECOND = 2_000
"""Units of time that the interpreter counts as one second, in place of nanoseconds."""


class MappedMemory(Protocol):
    """The part of a :class:`~xpar.comm.device.peer_memory.PeerMemory` that the trial uses."""

    group: Communicator
    device: torch.device

    def peers(self, front_bytes: int, limit: int) -> "Peers":
        """Return what kernels need to reach the peers."""


def waiting_limit(seconds: float, device: torch.device) -> int:
    """Return ``seconds`` as the kernels count: nanoseconds, or turns in the interpreter."""
    return int(seconds * (1e9 if device.type == "cuda" else TURNS_A_SECOND))


def try_exchange(memory: MappedMemory, deadlines: Deadlines) -> None:
    """Send one row from every rank to every rank and back, and compare; collective.

    Raises AgreedError on every rank where a row is wrong, or missing after the deadline for a new connection.
    """
    agreed(memory.group, lambda: _exchange(memory, deadlines.connect), "the trial exchange")


def _exchange(memory: MappedMemory, seconds: float) -> None:
    from xpar.kernels.gpu.one_sided import Exchange, Step

    size, rank, device = memory.group.size, memory.group.rank, memory.device
    step = Step((1,) * size, size, 4 * WIDTH, WIDTH, torch.float32)
    peers = memory.peers(step.front_bytes, waiting_limit(seconds, device))
    exchange = Exchange(peers, step)
    ids = torch.arange(
        size, dtype=torch.int32, device=device
    )  # expert e is on rank e: every row goes everywhere
    weights = torch.ones(1, size, device=device)
    row = torch.arange(WIDTH, device=device, dtype=torch.float32)[None] + 1000 * rank
    exchange.dispatch(row, ids[None], weights, ids, torch.zeros_like(ids))
    arrived = exchange.rows(torch.float32)
    exchange.rows_home(arrived + 1)
    back = exchange.sum_ranks(ids[None], ids)
    wrong = []
    for source in range(size):
        if not torch.equal(arrived[source], row[0] + 1000 * (source - rank)):
            wrong.append(f"the row of rank {source} did not arrive")
    if not torch.equal(back, size * (row + 1)):
        wrong.append("the sum of what came home is wrong")
    if int(peers.status[0]):
        raise ValueError(describe(peers.status.tolist(), memory.group.world_ranks, seconds))
    if wrong:
        raise ValueError("; ".join(wrong))


def describe(status: list[int], world_ranks: tuple[int, ...], seconds: float) -> str:
    """Return the text of the words ``status`` of a kernel that gave up waiting, or found other labels."""
    word, missing, epoch, kind, label, other = status
    if word - 1 in range(len(world_ranks)) and epoch == 0:
        return f"rank {world_ranks[word - 1]} gave up the exchange"
    late, waiting, layer = world_ranks[missing], world_ranks[word - 1], layer_of(label)
    exchange = f"exchange {epoch}" + (f" of layer {layer}" if layer >= 0 else "")
    if kind >= KINDS:
        where = f"is in layer {layer_of(other)}" if layer_of(other) != layer else "has another step or size"
        return f"{exchange}: rank {late} differs from rank {waiting}: it {where}"
    what = ("rows of tokens", "results")[kind]
    return (
        f"{exchange}: rank {late} has not sent its {what} {seconds:g} s after rank {waiting} began to wait "
        "for them"
    )
