"""The Triton experts of codes compiled for GPUs that this machine need not have: little spills, all fits."""

import re
from dataclasses import replace

import pytest
import torch
from triton_compiler import compiling

from xpar.kernels.contracts import Activation, ExpertInput, ExpertSpec
from xpar.kernels.gpu.code_tables import Height
from xpar.kernels.gpu.nibble_experts import NibbleExperts
from xpar.kernels.gpu.quantised_experts import QuantisedExperts
from xpar.kernels.gpu.tile_tables import Machine, Tile
from xpar.kernels.quantised_weight import ActivationScheme, CodeType, WeightFormat

SHARED = {80: (163, 164), 90: (227, 228), 100: (227, 228)}  # as in test_gpu_compiled.py
REGISTERS = 65536
BLOCK = WeightFormat(CodeType.E4M3, (128, 128), torch.float32)
CHANNEL = WeightFormat(CodeType.E4M3, (1, 0), torch.float32)
INT4 = WeightFormat(CodeType.INT4, (1, 32), torch.bfloat16)
INT4_128 = WeightFormat(CodeType.INT4, (1, 128), torch.bfloat16)
MXFP4 = WeightFormat(CodeType.E2M1, (1, 32), torch.float8_e8m0fnu)
NVFP4 = WeightFormat(CodeType.E2M1, (1, 16), torch.float8_e4m3fn, global_scale=True)
BY_GROUP, BY_TOKEN = ActivationScheme(), ActivationScheme(0)
CASES = {
    # arch, format, scheme, tokens on 16 experts, 4 a token: a quarter of that is the average of rows
    "block 16": (90, BLOCK, BY_GROUP, 16),
    "block 32": (90, BLOCK, BY_GROUP, 64),
    "block 64": (90, BLOCK, BY_GROUP, 128),
    "block 128": (90, BLOCK, BY_GROUP, 256),
    "channel 128": (90, CHANNEL, BY_TOKEN, 256),
    "alone 16": (90, BLOCK, None, 16),
    "alone 64": (90, BLOCK, None, 128),
    "alone 128": (90, BLOCK, None, 256),
    "vector": (90, BLOCK, BY_GROUP, 1),
    "int4": (90, INT4, None, 16),
    "mxfp4": (90, MXFP4, None, 16),
    "mxfp4 32": (90, MXFP4, None, 64),
    "mxfp4 64": (90, MXFP4, None, 256),
    "mxfp4 128": (90, MXFP4, None, 1024),
    "int4 by 128, 16": (90, INT4_128, None, 16),
    "int4 by 128, 32": (90, INT4_128, None, 64),
    "int4 by 128, 40": (90, INT4_128, None, 160),
    "int4 by 128, 64": (90, INT4_128, None, 256),
    "nvfp4": (90, NVFP4, None, 16),
    "mxfp4 vector": (90, MXFP4, None, 1),
    "int4 vector": (90, INT4, None, 1),
    "ampere vector": (80, MXFP4, None, 1),
    "blackwell vector": (100, BLOCK, None, 1),
    "ampere": (80, BLOCK, BY_GROUP, 16),
    "ampere mxfp4": (80, MXFP4, None, 16),
    "blackwell": (100, BLOCK, BY_GROUP, 16),
    "blackwell 128": (100, BLOCK, BY_GROUP, 256),
}
# Bytes a thread that a kernel may spill: with Triton 3.6 only that for NVFP4 does, whose sums are separate by
# 16 inputs, with 3.9 all gate-up products of nibbles. Decoded tiles that spill a little, once a tile, are the
# fastest of those that were tried on an H200.
SPILLS = {
    "nvfp4": 200, "mxfp4": 64, "mxfp4 32": 64, "mxfp4 128": 16, "int4": 160, "int4 by 128, 32": 64,
    "int4 by 128, 64": 64, "ampere mxfp4": 64,
}  # fmt: skip


# arch, format, tiles of gate_up and down: rows, columns, depth, copies in flight, warps, programs
DECODED = {
    "mxfp4 16": (90, MXFP4, Tile(16, 128, 128, 4, 4, 2), Tile(16, 128, 128, 4, 4, 3)),
    "mxfp4 64": (90, MXFP4, Tile(64, 64, 128, 3, 4, 2), Tile(64, 64, 128, 3, 4, 2)),
    "nvfp4 16": (90, NVFP4, Tile(16, 64, 128, 4, 4, 2), Tile(16, 128, 128, 4, 4, 2)),
    "int4 16": (90, INT4, Tile(16, 128, 128, 4, 4, 2), Tile(16, 128, 128, 4, 4, 3)),
    "int4 by 128": (90, INT4_128, Tile(32, 64, 128, 4, 4, 2), Tile(32, 128, 128, 4, 4, 2)),
    "e4m3 64": (90, BLOCK, Tile(64, 64, 128, 3, 4, 2), Tile(64, 64, 128, 3, 4, 2)),
    "ampere": (80, MXFP4, Tile(16, 64, 128, 3, 4, 2), Tile(16, 64, 128, 3, 4, 2)),
    "blackwell": (100, MXFP4, Tile(16, 64, 128, 4, 4, 2), Tile(16, 128, 128, 4, 4, 2)),
}


def miscompiled_codes(ptx):
    """Pairs of codes that a word joins and something else reads, too: ptxas 12.8 and 12.9 compile them wrong.

    They make the first pair in the word alone, and what else reads it reads a register without a value.
    """
    made = set(re.findall(r"cvt\.rn\.satfinite\.e4m3x2\.f32\s+(%rs\d+)", ptx))
    joined = re.findall(r"mov\.b32\s+%r\d+, \{(%rs\d+), (%rs\d+)\}", ptx)
    pairs = {register for word in joined if made.issuperset(word) for register in word}
    return {register for register in pairs if len(re.findall(rf"{register}\b", ptx)) > 2}


def kernel_of(arch, fmt, scheme):
    """Return a kernel whose launches are only compiled, nothing is computed."""
    spec = ExpertSpec(
        16, 2048, 768, torch.bfloat16, Activation("silu"), weight_format=fmt, activation_scheme=scheme
    )
    machine = Machine(sms=132, capability=divmod(arch, 10))
    kernel = (NibbleExperts if fmt.code.is_nibble else QuantisedExperts)(spec, machine=machine)
    kernel._missing.clear()
    return kernel


def launches(kernel, arch, tokens):
    """Return all launches of a batch, and the products among them."""
    ids = torch.zeros(tokens, 4, dtype=torch.int32)
    x = ExpertInput(torch.zeros(tokens, 2048, dtype=torch.bfloat16), ids, torch.ones(tokens, 4))
    with compiling(arch) as found:
        kernel.compute(x)
    return found, [k for k in found if k.name.startswith(("gate_up", "down"))]


@pytest.mark.parametrize("name", DECODED)
def test_weights_that_become_bfloat16_compile_without_spills(name):
    """On Hopper no product of a block waits for the one before it."""
    arch, fmt, gate_up, down = DECODED[name]
    kernel = kernel_of(arch, fmt, None)
    height = Height(float("inf"), gate_up, down, True, decoded=True)
    kernel.table = replace(kernel.table, heights=(height,), exact=0)
    found, products = launches(kernel, arch, 16)
    assert [k.name for k in found if "split" in k.name or "quantise" in k.name] == []
    for k, tile in zip(products, (gate_up, down), strict=True):
        assert "decoded" in k.name and k.spilt == 0, f"{k.name}: {k.spilt} bytes a thread"
        assert tile.per_sm * (k.shared + 1024) <= SHARED[arch][1] << 10, (k.name, tile)
        assert tile.per_sm * k.registers * k.warps * 32 <= REGISTERS, (k.name, tile)
        assert "fma.rn.bf16x2" in k.ptx and "cp.async" in k.ptx
        if arch == 90:
            assert "k16.f32.bf16.bf16" in k.ptx
            waits = re.findall(r"warp_group_dot_wait .*pendings = (\d+)", k.ttgir)
            # One for a block of each matrix where its scale is outside, otherwise one after all of them.
            assert 0 < waits.count("0") <= 2, f"{k.name} waits for each product: {waits}"


@pytest.mark.parametrize("name", CASES)
def test_compiles_to_what_the_tiles_were_chosen_for(name):
    arch, fmt, scheme, tokens = CASES[name]
    kernel = kernel_of(arch, fmt, scheme)
    found, products = launches(kernel, arch, tokens)
    assert len(products) == 2
    for k in found:
        assert k.spilt <= SPILLS.get(name, 0), f"{k.name}: {k.spilt} bytes a thread"
        assert k.shared <= SHARED[arch][0] << 10, f"{k.name}: {k.shared} bytes of shared memory"
        assert not miscompiled_codes(k.ptx), f"{k.name} reads codes that it also joins to words"
    if "vector" in name:
        for k in products:
            assert "ld.global.v4.b32" in k.ptx or "], 0x10" in k.ptx, f"{k.name} loads no 16 bytes at once"
        return
    height = kernel.table.height(tokens * 4, 16)
    for k, tile in zip(products, (height.gate_up, height.down), strict=True):
        assert tile.per_sm * (k.shared + 1024) <= SHARED[arch][1] << 10, (k.name, tile)
        assert tile.per_sm * k.registers * k.warps * 32 <= REGISTERS, (k.name, tile)
        if arch == 90:
            product = "k16.f32.bf16.bf16" if height.decoded else "e4m3.e4m3"
            assert product in k.ptx, f"{k.name} does not multiply by {product}"
            copies = "cp.async.cg" if fmt.code.is_nibble else "cp.async.bulk.tensor"
            assert copies in k.ptx, f"{k.name} does not copy weights by {copies}"
        if fmt.code is CodeType.E2M1 and arch >= 90:
            assert "lop3.b32" in k.ptx
