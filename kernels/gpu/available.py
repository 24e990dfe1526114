"""Whether the Triton kernels can serve a layer here, decided without importing Triton."""

from importlib.util import find_spec

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
