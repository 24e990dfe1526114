"""Compile for GPUs that this machine does not have, through the very launches that would run there.

Triton asks its driver what to compile for: here that is a name. A launch then compiles, is noted, and does
nothing.
"""

import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclass(frozen=True)
class Compiled:
    """What became of one launch: registers a thread, bytes spilt a thread, bytes of shared memory, warps, and
    text.

    ``ttgir``: the last form in which tiles and copies are seen whole; ``ptx``: assembly.
    """

    name: str
    registers: int
    spilt: int
    shared: int
    warps: int
    ttgir: str
    ptx: str


class Driver:
    """As much of a Triton driver as compiling asks for."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return self.arch  # kernels are cached by device

    def get_current_stream(self, device: int) -> int:
        return 0


@contextmanager
def compiling(arch: int) -> Iterator[list[Compiled]]:
    """Inside, launches compile for compute capability ``arch`` (90 for 9.0) and are noted in the list."""
    found: list[Compiled] = []
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        found.append(_examine(self.__name__, kernel))
        return kernel

    before = driver._active
    driver._active, JITFunction.run = Driver(arch), compile_only
    try:
        yield found
    finally:
        driver._active, JITFunction.run = before, run


def _examine(name: str, kernel: Any) -> Compiled:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(kernel.asm["cubin"])
        cubin.flush()
        usage = subprocess.run(
            [TOOLS / "cuobjdump", "-res-usage", cubin.name], check=True, capture_output=True, text=True
        ).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) .*?LOCAL:(\d+)", usage)
    assert found, usage
    registers, stack, local = map(int, found.groups())
    shared, warps = kernel.metadata.shared, kernel.metadata.num_warps
    return Compiled(name, registers, max(stack, local), shared, warps, kernel.asm["ttgir"], kernel.asm["ptx"])
