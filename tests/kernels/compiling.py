"""Compile for GPUs that this machine does not have, through the very launches that would run there.

Triton asks its driver what to compile for: here that is a name. A launch then compiles, is noted, and does nothing.
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
# Bytes of shared memory that one program may have, by compute capability (CUDA programming guide, table of
# technical specifications).
SHARED_LIMIT = {80: 163 << 10, 86: 99 << 10, 90: 227 << 10, 100: 227 << 10}


@dataclass(frozen=True)
class Compiled:
    """What became of one launch: registers a thread, bytes spilt a thread, bytes of shared memory, warps, code."""

    name: str
    arch: int
    registers: int
    spilt: int
    shared: int
    warps: int
    code: str

    def count(self, instruction: str) -> int:
        return len(re.findall(rf"\b{instruction}\b", self.code))


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
        found.append(_examine(self.__name__, arch, kernel))
        return kernel

    before = driver._active
    driver._active, JITFunction.run = Driver(arch), compile_only
    try:
        yield found
    finally:
        driver._active, JITFunction.run = before, run


def _examine(name: str, arch: int, kernel: Any) -> Compiled:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(kernel.asm["cubin"])
        cubin.flush()
        usage = _tool("cuobjdump", "-res-usage", cubin.name)
        code = _tool("nvdisasm", "-c", cubin.name)
    found = re.search(r"REG:(\d+) STACK:(\d+) .*?LOCAL:(\d+)", usage)
    assert found, usage
    registers, stack, local = map(int, found.groups())
    loads = len(re.findall(r"\bSTL\b", code))
    return Compiled(
        name,
        arch,
        registers,
        max(stack, local, loads),
        kernel.metadata.shared,
        kernel.metadata.num_warps,
        code,
    )


def _tool(name: str, *words: str) -> str:
    return subprocess.run([TOOLS / name, *words], check=True, capture_output=True, text=True).stdout
