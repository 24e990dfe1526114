"""Compute with compiled products and with torch, and print the number of OpenMP runtimes."""

import sys
from pathlib import Path

import torch

from xpar.kernels import choose_linear

torch.set_num_threads(2)
native = choose_linear(torch.bfloat16, "native").chosen.build(torch.ones(256, 64), None)
native(torch.ones(3, 64).bfloat16())
torch.ones(999, 999) @ torch.ones(999, 999)
libraries = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines()}
runtimes = [path for path in libraries if any(name in path for name in ("libgomp", "libiomp", "libomp"))]
sys.stdout.write(f"{len(runtimes)}\n")
