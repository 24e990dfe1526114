"""Whether the Triton kernels can serve a layer here, decided without importing Triton."""

from importlib.util import find_spec
from pathlib import Path

import torch

from xpar.kernels.contracts import ExpertKernel, ExpertSpec

# The oldest architecture with bfloat16 matrix units and asynchronous copies to shared memory.
_OLDEST = (8, 0)


def unavailable(spec: ExpertSpec) -> str | None:
    """Why these kernels cannot serve ``spec`` here, or None."""
    if find_spec("triton") is None:
        return "triton is not installed (pip install triton)"
    if not torch.cuda.is_available():
        return "torch sees no GPU here"
    found = torch.cuda.get_device_capability(spec.device)
    if found < _OLDEST:
        return f"compute capability {found[0]}.{found[1]} is below {_OLDEST[0]}.{_OLDEST[1]}"
    return None


def build(spec: ExpertSpec) -> ExpertKernel:
    """A :class:`xpar.kernels.gpu.experts.TritonExperts`, imported here so that nothing else needs Triton."""
    from xpar.kernels.gpu.experts import TritonExperts

    return TritonExperts(spec)


def use_table(kernel: ExpertKernel, path: Path) -> None:
    """Give ``kernel`` this machine's tile table out of ``path``; ValueError if it has none or the file has none."""
    from xpar.kernels.gpu.tile_tables import read_table

    if kernel.name != "triton":
        raise ValueError(f"tiles={path}: kernel {kernel.name} has no tile table; leave tiles out")
    from xpar.kernels.gpu.experts import TritonExperts

    assert isinstance(kernel, TritonExperts)
    table = read_table(path, kernel.machine, kernel.spec.dtype)
    if table is None:
        raise ValueError(
            f"{path}: no table for {kernel.machine} and {kernel.spec.dtype}; measure one here with xpar tune"
        )
    kernel.table = table
