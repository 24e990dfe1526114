"""The check whether the Triton kernels can serve a layer here, without importing Triton."""

from importlib.util import find_spec
from pathlib import Path

import torch

from xpar.kernels.contracts import ExpertKernel, ExpertSpec

# The oldest compute capability with bfloat16 matrix units and asynchronous copies to shared memory.
_OLDEST = (8, 0)


def has_triton() -> bool:
    """Return whether Triton is installed; it is not imported."""
    return find_spec("triton") is not None


def why_unavailable(spec: ExpertSpec) -> str | None:
    """Return the reason why these kernels cannot serve ``spec`` on this machine, or None."""
    if not has_triton():
        return "triton is not installed (pip install triton)"
    if not torch.cuda.is_available():
        return "torch sees no GPU here"
    found = torch.cuda.get_device_capability(spec.device)
    if found < _OLDEST:
        return f"compute capability {found[0]}.{found[1]} is below {_OLDEST[0]}.{_OLDEST[1]}"
    return None


def build(spec: ExpertSpec) -> ExpertKernel:
    """Make the kernel for plain weights or for ``spec.weight_format``; only this call imports Triton."""
    if spec.weight_format is not None:
        from xpar.kernels.gpu.nibble_experts import NibbleExperts
        from xpar.kernels.gpu.quantised_experts import QuantisedExperts

        return (NibbleExperts if spec.weight_format.code.is_nibble else QuantisedExperts)(spec)
    from xpar.kernels.gpu.experts import TritonExperts

    return TritonExperts(spec)


def use_table(kernel: ExpertKernel, path: Path) -> None:
    """Set ``kernel.table`` to the one for this machine in ``path``; ValueError without one."""
    from xpar.kernels.gpu.tile_tables import read_table

    if kernel.name != "triton":
        raise ValueError(f"tiles={path}: kernel {kernel.name} has no tile table; leave tiles out")
    from xpar.kernels.gpu.experts import TritonExperts

    if not isinstance(kernel, TritonExperts):
        raise ValueError(  # noqa: TRY004 - the option is wrong, not a type
            f"tiles={path}: tables are for plain weights, not {kernel.spec.weight_format}; leave tiles out"
        )
    table = read_table(path, kernel.machine, kernel.spec.dtype)
    if table is None:
        raise ValueError(
            f"{path}: no table for {kernel.machine} and {kernel.spec.dtype}; measure one here with xpar tune"
        )
    kernel.table = table
