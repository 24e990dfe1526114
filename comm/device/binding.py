"""Which GPU this rank computes on; chosen by its place on the node as MPI observes it, verified by GPU UUID."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

DRIVER_FILE = "/proc/driver/nvidia/version"


@dataclass(frozen=True)
class Gpu:
    """``index`` among the ``visible`` GPUs of this process; ``uuid`` tells GPUs apart across processes and nodes."""

    index: int
    visible: int
    name: str
    uuid: str

    def __str__(self) -> str:
        return f"{self.index} of {self.visible}: {self.name} {self.uuid[:8]}"


def gpu_index(local_rank: int, visible: int) -> int:
    """The GPU of the ``local_rank``-th rank of a node, of ``visible`` ones.

    A launcher that gives each task its own GPU shows one to every rank, which is then index 0 for all of them. More
    ranks than GPUs share them in turn; :mod:`xpar.comm.device.transport` sees that by the UUIDs and says what follows.
    """
    return local_rank % visible


def find_gpu(local_rank: int) -> Gpu:
    """This rank's GPU, not yet taken. Raises ValueError if this process sees none."""
    if not torch.cuda.is_available():
        build = (
            "this torch is a CPU build" if torch.version.cuda is None else "torch sees no GPU or no driver"
        )
        raise ValueError(
            f"device='cuda': {build} (torch {torch.__version__}); use device='cpu', or check CUDA_VISIBLE_DEVICES, the "
            "batch system's GPU options and `xpar doctor`"
        )
    visible = torch.cuda.device_count()
    index = gpu_index(local_rank, visible)
    properties = torch.cuda.get_device_properties(index)
    return Gpu(index, visible, properties.name, str(properties.uuid))


def bind_gpu(local_rank: int) -> Gpu:
    """Make this rank's GPU the current one, before anything else is put on a GPU."""
    gpu = find_gpu(local_rank)
    torch.cuda.set_device(gpu.index)
    return gpu


def shared_gpus(uuids: Sequence[str]) -> dict[str, list[int]]:
    """The ranks of each GPU that more than one rank has."""
    ranks: dict[str, list[int]] = {}
    for rank, uuid in enumerate(uuids):
        ranks.setdefault(uuid, []).append(rank)
    return {uuid: those for uuid, those in ranks.items() if len(those) > 1}


def driver_version() -> str | None:
    """The version of the NVIDIA kernel driver, None where there is none."""
    try:
        text = Path(DRIVER_FILE).read_text()
    except OSError:
        return None
    found = re.search(r"\s(\d{3,}\.\d+(?:\.\d+)?)\s", text)
    return found.group(1) if found else "unknown"
