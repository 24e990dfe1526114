"""What xpar guards against in zentorch: packing in place, addresses remembered, an import with side effects."""

import subprocess
import sys

import pytest
import torch

from xpar.kernels import reference
from xpar.kernels.contracts import Activation, ExpertInput, ExpertSpec
from xpar.kernels.cpu import experts_zen
from xpar.kernels.cpu.experts_zen import Arena

SPEC = ExpertSpec(6, 128, 192, torch.bfloat16, Activation("silu"))
needs_zen = pytest.mark.skipif(
    experts_zen.why_unavailable(SPEC) is not None, reason=str(experts_zen.why_unavailable(SPEC))
)


def run(program: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def test_choosing_does_not_import():
    program = """
import sys, torch
from xpar.kernels.contracts import Activation, ExpertSpec
from xpar.kernels.registry import choose_kernel
choose_kernel(ExpertSpec(8, 128, 192, torch.bfloat16, Activation("silu"))).explain()
print("zentorch" in sys.modules)
"""
    assert run(program).strip() == "False"


@needs_zen
def test_building_changes_nothing_else():
    program = """
import os, torch
from xpar.kernels.contracts import Activation, ExpertSpec
from xpar.kernels.registry import choose_kernel
x, w = torch.randn(9, 640), torch.randn(320, 640)
def state():
    products = [torch.nn.functional.linear(x.to(d), w.to(d)) for d in (torch.float32, torch.bfloat16)]
    flags = torch.get_num_threads(), torch.get_default_dtype(), torch.backends.mkldnn.enabled
    return products, flags, dict(os.environ)
before = state()
spec = ExpertSpec(4, 128, 192, torch.bfloat16, Activation("silu"))
kernel = choose_kernel(spec, "zentorch").chosen.build(spec)
for e in range(4):
    kernel.load_expert(e, torch.randn(384, 128), torch.randn(128, 192))
after = state()
assert all(map(torch.equal, before[0], after[0])) and before[1] == after[1]
assert before[2] == after[2]
"""
    assert run(program) == ""


@needs_zen
def test_thread_count_may_change_after_packing(g):
    gate_up, down = torch.randn(6, 384, 128, generator=g) / 11, torch.randn(6, 128, 192, generator=g) / 14
    gate_up, down = gate_up.to(SPEC.dtype), down.to(SPEC.dtype)
    x = torch.randn(90, 128, generator=g).to(SPEC.dtype)
    ids = torch.rand(90, 6, generator=g).topk(2).indices.to(torch.int32)
    weights = torch.rand(90, 2, generator=g)
    expected = reference.routed_experts(x, ids, weights, gate_up, down, Activation("silu"))
    before = torch.get_num_threads()
    try:
        for packed_with in (2, 1):
            torch.set_num_threads(packed_with)
            kernel = experts_zen.ZenExperts(SPEC)
            for expert in range(6):
                kernel.load_expert(expert, gate_up[expert], down[expert])
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                for size in (1, 7, 90):
                    got = kernel.compute(ExpertInput(x[:size], ids[:size], weights[:size]))
                    error = (got.float() - expected[:size]).norm() / expected[:size].norm()
                    assert error < 1e-2, (packed_with, threads, size)
    finally:
        torch.set_num_threads(before)


@needs_zen
def test_packed_weights_cannot_be_replaced():
    kernel = experts_zen.ZenExperts(SPEC)
    for expert in range(6):
        kernel.load_expert(expert, torch.ones(384, 128), torch.ones(128, 192))
    with pytest.raises(RuntimeError, match="packed already; build a new kernel"):
        kernel.load_expert(0, torch.ones(384, 128), torch.ones(128, 192))


def test_arena_addresses_are_never_used_again():
    seen: set[int] = set()
    for _ in range(20):
        arena = Arena(2**22)
        first = arena.take((2**20,), torch.bfloat16)
        second = arena.take((3, 5), torch.float32)
        assert second.data_ptr() == first.data_ptr() + first.nbytes
        assert not first.any()
        first.fill_(1)
        span = set(range(first.data_ptr() >> 12, (second.data_ptr() + second.nbytes >> 12) + 1))
        assert not seen & span
        seen |= span
        del arena, first, second
