"""Print the bytes of a layer's weights, and the growth of the process's peak memory.

Argument: the name of the expert kernel.
"""

import re
import sys
from pathlib import Path

import torch

from xpar.kernels import Activation, ExpertInput, ExpertSpec, choose_kernel


def status(field: str) -> int:
    """Return a field of /proc/self/status in bytes."""
    found = re.search(field + r":\s+(\d+)", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) * 1024


def compute(experts: int, hidden: int, width: int) -> int:
    """Load a layer, compute with it on 1, 2 and 1 threads, and return the bytes of its weights."""
    spec = ExpertSpec(experts, hidden, width, torch.bfloat16, Activation("silu"))
    kernel = choose_kernel(spec, sys.argv[1]).chosen.build(spec)
    for expert in range(experts):
        gate_up = torch.ones(2 * width, hidden, dtype=spec.dtype)
        kernel.load_expert(expert, gate_up, torch.ones(hidden, width, dtype=spec.dtype))
    ids = torch.rand(64, experts).topk(4).indices.to(torch.int32)
    for threads in (1, 2, 1):
        torch.set_num_threads(threads)
        kernel.compute(ExpertInput(torch.ones(64, hidden, dtype=spec.dtype), ids, torch.ones(64, 4)))
    return kernel.nbytes()


compute(8, 512, 512)  # what libraries keep for good is there before
Path("/proc/self/clear_refs").write_text("5")  # resets the peak
before = status("VmRSS")
sys.stdout.write(f"{compute(24, 1536, 1024)} {status('VmHWM') - before}\n")
