"""The GPU of a rank, chosen by the rank's index on its node as MPI observes it.

GPUs are told apart by their UUIDs.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

DRIVER_FILE = "/proc/driver/nvidia/version"


@dataclass(frozen=True)
class Gpu:
    """A GPU as one process sees it.

    Attributes:
        index: Its index among the GPUs that this process sees.
        visible: Number of those GPUs.
        name: The model's name.
        uuid: Tells GPUs apart across processes and nodes.
    """

    index: int
    visible: int
    name: str
    uuid: str

    def __str__(self) -> str:
        return f"{self.index} of {self.visible}: {self.name} {self.uuid[:8]}"


def gpu_index(local_rank: int, visible: int) -> int:
    """Return the index of the GPU for rank ``local_rank`` of a node that sees ``visible`` GPUs.

    If the launcher shows each rank one GPU of its own, the index is 0 on all ranks. If there are
    more ranks than GPUs, ranks share GPUs in turn; :mod:`xpar.comm.device.transport_choice` finds
    that out from the UUIDs.
    """
    return local_rank % visible


def find_gpu(local_rank: int) -> Gpu:
    """Return this rank's GPU without making it current; ValueError if this process sees none."""
    if not torch.cuda.is_available():
        build = (
            "this torch is a CPU build" if torch.version.cuda is None else "torch sees no GPU or no driver"
        )
        raise ValueError(
            f"device='cuda': {build} (torch {torch.__version__}); use device='cpu', or check "
            "CUDA_VISIBLE_DEVICES, the batch system's GPU options and `xpar doctor`"
        )
    visible = torch.cuda.device_count()
    index = gpu_index(local_rank, visible)
    properties = torch.cuda.get_device_properties(index)
    return Gpu(index, visible, properties.name, str(properties.uuid))


def bind_gpu(local_rank: int) -> Gpu:
    """Make this rank's GPU the current one; to be called before anything is put on a GPU."""
    gpu = find_gpu(local_rank)
    torch.cuda.set_device(gpu.index)
    return gpu


def shared_gpus(uuids: Sequence[str]) -> dict[str, list[int]]:
    """Return the ranks of each GPU that several ranks have; ``uuids``: the GPU of every rank."""
    ranks: dict[str, list[int]] = {}
    for rank, uuid in enumerate(uuids):
        ranks.setdefault(uuid, []).append(rank)
    return {uuid: group for uuid, group in ranks.items() if len(group) > 1}


def driver_version() -> str | None:
    """Return the version of the NVIDIA kernel driver, None without a driver."""
    try:
        text = Path(DRIVER_FILE).read_text()
    except OSError:
        return None
    found = re.search(r"\s(\d{3,}\.\d+(?:\.\d+)?)\s", text)
    return found.group(1) if found else "unknown"
