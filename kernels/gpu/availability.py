"""The check whether the Triton kernels can serve a layer here, without importing Triton."""

from importlib.util import find_spec
from pathlib import Path

import torch

from xpar.kernels.contracts import ExpertKernel, ExpertSpec
from xpar.kernels.quantised_weight import CodeType, WeightFormat

# The oldest compute capability with bfloat16 matrix units and asynchronous copies to shared memory.
_OLDEST = (8, 0)
_BLOCK = 128  # inputs that share a scale of the activations


def why_unavailable(spec: ExpertSpec) -> str | None:
    """Return the reason why these kernels cannot serve ``spec`` on this machine, or None."""
    if find_spec("triton") is None:
        return "triton is not installed (pip install triton)"
    if not torch.cuda.is_available():
        return "torch sees no GPU here"
    found = torch.cuda.get_device_capability(spec.device)
    if found < _OLDEST:
        return f"compute capability {found[0]}.{found[1]} is below {_OLDEST[0]}.{_OLDEST[1]}"
    return None


def why_not_format(fmt: WeightFormat) -> str | None:
    """Return the reason why the kernels cannot compute from weights of a format, or None."""
    rows, columns = fmt.block
    if fmt.code is CodeType.E4M3 and (fmt.zero_point or columns % _BLOCK):
        return f"computes from e4m3 in blocks of a multiple of {_BLOCK} columns or whole rows, not from {fmt}"
    if fmt.code is CodeType.INT8:
        return f"does not compute from {fmt} weights"
    if fmt.code.is_nibble:
        fits = rows == 1 and (columns % _BLOCK == 0 or columns in (32, 64))
        if fmt.code is CodeType.E2M1 and not fmt.zero_point:
            fits = fits or (rows, columns) == (1, 16)
        if not fits:
            return f"computes from nibbles in groups of 32, 64 or 128 columns of a row, not from {fmt}"
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
