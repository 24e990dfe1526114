"""The guards against zentorch's packing in place, its memory of addresses and its import's side effects."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from xpar.kernels import reference
from xpar.kernels.contracts import Activation, ExpertInput, ExpertSpec
from xpar.kernels.cpu import experts_zen
from xpar.kernels.cpu.experts_zen import Arena
from xpar.kernels.cpu.linear_zen import ZenLinear

PROGRAMS = Path(__file__).parents[1] / "programs"
SPEC = ExpertSpec(6, 128, 192, torch.bfloat16, Activation("silu"))
needs_zen = pytest.mark.skipif(
    experts_zen.why_unavailable(SPEC) is not None, reason=str(experts_zen.why_unavailable(SPEC))
)


def run(program: str) -> str:
    """Run a program of ``tests/programs`` and return what it printed."""
    done = subprocess.run(
        [sys.executable, PROGRAMS / program], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def test_choosing_does_not_load_zentorch():
    assert run("zentorch_choice.py").strip() == "False"


@needs_zen
def test_building_changes_nothing_else():
    assert run("zentorch_side_effects.py") == ""


@needs_zen
def test_a_dense_product_is_compiled_without_the_package(g):
    linear = ZenLinear(torch.randn(24, 40, generator=g).bfloat16())
    compiled = torch.compile(lambda x: linear(x) * 2, fullgraph=True, dynamic=True, backend="aot_eager")
    for shape in ((3, 40), (2, 5, 40)):
        x = torch.randn(*shape, generator=g).bfloat16()
        assert torch.equal(compiled(x), linear(x) * 2)


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
