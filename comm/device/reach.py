"""Facts that ranks exchange before they try to map each other's GPU memory."""

import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from xpar.comm.device.binding import driver_version, shared_gpus
from xpar.kernels.gpu.limits import MOST_RANKS

BOOT = Path("/proc/sys/kernel/random/boot_id")


@dataclass(frozen=True)
class ReachFacts:
    """The facts of one rank.

    ``host``: its name and this boot of it. ``uuid``: of its GPU. ``unreachable``: UUIDs of those visible GPUs
    that its own one cannot address; a GPU that the launcher hides from this rank is not among them, and the
    trial decides.
    """

    host: str
    uuid: str
    driver: str | None
    unreachable: tuple[str, ...]


def reach_facts(device: torch.device) -> ReachFacts:
    """Return this rank's facts; no GPU context is made on other GPUs."""
    try:
        boot = BOOT.read_text().strip()
    except OSError:
        boot = ""
    own = device.index or 0
    uuids = [str(torch.cuda.get_device_properties(i).uuid) for i in range(torch.cuda.device_count())]
    unreachable = tuple(
        uuid for i, uuid in enumerate(uuids) if i != own and not torch.cuda.can_device_access_peer(own, i)
    )
    return ReachFacts(f"{socket.gethostname()} {boot}", uuids[own], driver_version(), unreachable)


def why_unreachable(facts: Sequence[ReachFacts]) -> str | None:
    """Return why ranks with ``facts`` cannot map each other's memory; None: try it."""
    if len(facts) > MOST_RANKS:
        return f"{len(facts)} ranks; an exchange has flags for at most {MOST_RANKS}"
    hosts = sorted({f.host for f in facts})
    if len(hosts) > 1:
        return f"the ranks are on {len(hosts)} hosts, and memory is mapped inside one"
    drivers = sorted({f.driver or "unknown" for f in facts})
    if len(drivers) > 1:
        return f"the ranks see different NVIDIA drivers: {', '.join(drivers)}"
    uuids = [f.uuid for f in facts]
    for rank, f in enumerate(facts):
        for peer, uuid in enumerate(uuids):
            if uuid in f.unreachable:
                return (
                    f"the GPU of rank {rank} cannot address that of rank {peer} (no peer access between them)"
                )
    return None


def why_slow(facts: Sequence[ReachFacts]) -> str | None:
    """Return why an exchange would be right but slow, or None.

    Ranks that share a GPU take turns, and one that waits has its turn all the same.
    """
    for uuid, ranks in shared_gpus([f.uuid for f in facts]).items():
        return (
            f"ranks {', '.join(map(str, ranks))} share GPU {uuid}, and a rank that waits holds its time slice"
        )
    return None
