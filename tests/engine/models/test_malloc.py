"""Memory that a step has freed serves the next one without a page fault."""

import gc
import subprocess
import sys

import pytest

from xpar.engine.models.malloc import without_collection

FAULTS = """
import resource
import torch
from xpar.engine.models.malloc import keep_freed_memory
assert keep_freed_memory()
def step():
    return [torch.ones(2 << 20, dtype=torch.uint8) for _ in range(8)]
for _ in range(3): step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20): step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def test_a_step_finds_the_memory_of_the_one_before() -> None:
    """Without the call it is 81280 faults, or none, by the luck of what lies at the end of the heap."""
    job = subprocess.run(
        [sys.executable, "-c", FAULTS], check=True, capture_output=True, text=True, timeout=120
    )
    assert int(job.stdout) < 1000


GIVEN_BACK = """
import re
from pathlib import Path
import torch
from xpar.engine.models.malloc import give_back_freed_memory, keep_freed_memory
def resident():
    return int(re.search(r"VmRSS:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024
assert keep_freed_memory()
blocks = [torch.ones(8 << 20, dtype=torch.uint8) for _ in range(20)]
kept = blocks[1::2]  # what is free lies between what is not
del blocks
before = resident()
assert give_back_freed_memory()
print(before - resident())
"""


def test_what_lies_between_blocks_in_use_is_given_back() -> None:
    job = subprocess.run(
        [sys.executable, "-c", GIVEN_BACK], check=True, capture_output=True, text=True, timeout=120
    )
    assert int(job.stdout) > 8 * (8 << 20)


@pytest.mark.parametrize("is_enabled", [True, False])
def test_cycles_are_left_alone_inside_and_collection_is_as_before(is_enabled: bool) -> None:
    before = gc.isenabled()
    try:
        gc.enable() if is_enabled else gc.disable()
        with pytest.raises(ValueError), without_collection():
            assert not gc.isenabled()
            raise ValueError
        assert gc.isenabled() == is_enabled
    finally:
        gc.enable() if before else gc.disable()
