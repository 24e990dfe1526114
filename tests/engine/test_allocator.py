"""Memory that a step has freed serves the next one without a page fault."""

import subprocess
import sys

FAULTS = """
import resource, sys
import torch
from xpar.engine.allocator import keep_freed_memory
assert keep_freed_memory() or sys.argv[1] == "without"
def step():
    return [torch.ones(2 << 20, dtype=torch.uint8) for _ in range(8)]
for _ in range(3): step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20): step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(call: bool) -> int:
    source = FAULTS if call else FAULTS.replace("assert keep_freed_memory()", "assert False")
    words = [sys.executable, "-c", source, "with" if call else "without"]
    return int(subprocess.run(words, check=True, capture_output=True, text=True, timeout=120).stdout)


def test_a_step_finds_the_memory_of_the_one_before() -> None:
    pages = 20 * 8 * (2 << 20) // 4096
    assert faults(call=False) > pages / 4, (
        "this C library keeps freed memory by itself: the call is of no use"
    )
    assert faults(call=True) < pages / 100
