"""Memory of this rank's GPU that all ranks of its group map, in the first way that works."""

import atexit
import ctypes
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from xpar.comm.communicator import Communicator
from xpar.comm.device.backend import current_stream
from xpar.comm.device.cuda_driver import Driver
from xpar.comm.device.mappings import ROUND, DescriptorMapping, HostMapping, IpcMapping, Mapping
from xpar.comm.device.reach import reach_facts, why_slow, why_unreachable
from xpar.comm.failure import AgreedError, agreed
from xpar.comm.watchdog.deadlines import Deadlines

if TYPE_CHECKING:
    from xpar.kernels.gpu.one_sided import Peers

log = logging.getLogger("xpar.comm")
Way = Callable[[Communicator, int, torch.device], Mapping]
GPU_WAYS: tuple[Way, ...] = (IpcMapping, DescriptorMapping)
"""In the order in which they are tried."""


@dataclass(frozen=True)
class PeerAccess:
    """A record of how the ranks of a group map each other's memory, the same on every rank.

    ``way``: how, or None. ``rejected``: (way, reason) of every other one. ``slow``: why it would be right but
    slow, or None.
    """

    way: str | None
    rejected: tuple[tuple[str, str], ...] = ()
    slow: str | None = None

    def explain(self) -> str:
        """Return one line a way, the chosen one first."""
        lines = (
            [] if self.way is None else [f"{self.way}: chosen" + (f", but {self.slow}" if self.slow else "")]
        )
        return "\n".join(lines + [f"{way}: passed over, {reason}" for way, reason in self.rejected])

    @property
    def refusal(self) -> str | None:
        """Return why there is no way, in one line; None where there is one."""
        return None if self.way else "; ".join(f"{way}: {reason}" for way, reason in self.rejected)


class PeerMemory:
    """A window of this rank's GPU memory that every rank of ``group`` maps.

    ``bytes`` [n] uint8: this rank's own, zero at first. ``bases``: address here of each rank's. ``access``:
    how they were opened. ``status`` [6] int32, in host memory: what a kernel that gave up waiting says, see
    :func:`~xpar.comm.device.trial.describe`. Closing is collective and runs by itself when the process ends;
    where a process is killed the driver frees its memory with the last one that maps it.
    """

    def __init__(
        self, group: Communicator, mapping: Mapping, access: PeerAccess, device: torch.device
    ) -> None:
        self.group, self.access, self.device = group, access, device
        self._mapping: Mapping | None = mapping
        self.bytes, self.bases = mapping.bytes, mapping.bases
        own = mapping.bases[group.rank]
        deltas = [base - own for base in mapping.bases]
        self._delta = torch.tensor(deltas, dtype=torch.int64, device=device)
        self._state, self._counters = (torch.zeros(2, dtype=torch.int32, device=device) for _ in range(2))
        self._limit = torch.zeros(1, dtype=torch.int64, device=device)
        self.status = torch.zeros(6, dtype=torch.int32, pin_memory=device.type == "cuda")
        self.bytes.zero_()
        _synchronize(device)
        group.barrier()  # no kernel of a peer before the flags are zero
        atexit.register(self.close)

    @classmethod
    def open(
        cls,
        group: Communicator,
        nbytes: int,
        device: torch.device,
        *,
        ways: Sequence[Way] | None = None,
        trial: Callable[["PeerMemory"], None] | None = None,
    ) -> "PeerMemory":
        """Open ``nbytes`` on every rank, rounded up; collective over ``group``.

        Args:
            group: ranks of one node.
            nbytes: the same number on every rank.
            device: this rank's GPU; on "cpu" the memory is an MPI window, for Triton's interpreter.
            ways: those to try, in order; by default all there are for ``device``.
            trial: an exchange that raises where the memory does not work; a way that fails it is passed over.

        Returns:
            The memory; its ``access`` has the reasons against the other ways.

        Raises:
            AgreedError: on every rank, with the reason against every way.
        """
        nbytes = -(-nbytes // ROUND) * ROUND
        rejected, slow = [], None
        if device.type == "cuda":
            facts = group.all_gather_object(agreed(group, lambda: reach_facts(device), "peer memory"))
            refusal, slow = why_unreachable(facts), why_slow(facts)
            if refusal is not None:
                raise AgreedError(f"peer memory: {refusal}")
            torch.cuda.synchronize(device)  # makes the GPU's own context current in this thread
        ways = tuple(ways or (GPU_WAYS if device.type == "cuda" else (HostMapping,)))
        names = [str(getattr(way, "way", way)) for way in ways]
        for n, (way, name) in enumerate(zip(ways, names, strict=True)):
            try:
                mapping = way(group, nbytes, device)
            except AgreedError as error:
                rejected.append((name, _first_line(error)))
                continue
            later = [(other, f"{name} come first") for other in names[n + 1 :]]
            memory = cls(group, mapping, PeerAccess(name, (*rejected, *later), slow), device)
            try:
                if trial is not None:
                    trial(memory)
            except AgreedError as error:
                memory.close()
                rejected.append((name, _first_line(error)))
                continue
            log.info("peer memory of group %s: %.1f MB by %s", group.name, nbytes / 1e6, name)
            return memory
        raise AgreedError("peer memory: " + "; ".join(f"{name}: {reason}" for name, reason in rejected))

    def peers(self, front: int, limit: int) -> "Peers":
        """Return what kernels need; ``front``: see :class:`~xpar.kernels.gpu.one_sided.Peers`.

        ``limit``: how long a kernel waits, nanoseconds. Epochs go on where the last exchange on this memory
        left them.
        """
        from xpar.kernels.gpu.one_sided import Peers

        on_gpu = self.device.type == "cuda"
        processors = torch.cuda.get_device_properties(self.device).multi_processor_count if on_gpu else 4
        self._limit.fill_(limit)
        return Peers(
            self.group.rank,
            self.bytes,
            self._delta,
            self._state,
            self._counters,
            self._limit,
            self.status,
            front,
            processors,
            self.group.checks_collectives(),
        )

    def copy_to(self, rank: int, nbytes: int) -> None:
        """Copy the first ``nbytes`` of this rank's window to ``rank``'s, without a kernel.

        On a GPU the current stream's work; for measurements of the link alone.
        """
        source, target = self.bases[self.group.rank], self.bases[rank]
        if self.device.type == "cuda":
            Driver().copy(target, source, nbytes, current_stream(self.device))
        else:
            ctypes.memmove(target, source, nbytes)

    def close(self) -> None:
        """Give the memory back on every rank; collective, and harmless the second time."""
        atexit.unregister(self.close)
        if self._mapping is None:
            return
        mapping, self._mapping = self._mapping, None
        self.bytes = torch.empty(0, dtype=torch.uint8)
        _synchronize(self.device)
        self.group.barrier()  # nobody stores any more
        mapping.close_peers()
        self.group.barrier()  # nobody maps any more
        mapping.close_own()


def find_access(group: Communicator, device: torch.device, deadlines: Deadlines) -> PeerAccess:
    """Find out by a trial how the ranks of ``group`` can map each other's memory; collective.

    What ``xpar doctor`` shows, and what the choice of a dispatcher rests on.
    """
    from xpar.comm.device.trial import try_exchange

    try:
        memory = PeerMemory.open(group, ROUND, device, trial=lambda m: try_exchange(m, deadlines))
    except AgreedError as error:
        return PeerAccess(None, (("peer memory", _first_line(error).removeprefix("peer memory: ")),))
    memory.close()
    return memory.access


def _first_line(error: AgreedError) -> str:
    return (
        str(error).strip().splitlines()[-1]
        if "Traceback" in str(error)
        else str(error).strip().splitlines()[0]
    )


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
