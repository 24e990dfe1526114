"""The Triton experts compiled for GPUs that this machine need not have: nothing spills, everything fits."""

import re
from dataclasses import replace

import pytest
import torch
from triton_compiler import compiling

from xpar.kernels.contracts import Activation, ExpertInput, ExpertSpec
from xpar.kernels.gpu.default_tables import HOPPER_HEIGHTS, default_table
from xpar.kernels.gpu.expert_sort import plan_tiles
from xpar.kernels.gpu.experts import TritonExperts
from xpar.kernels.gpu.tile_tables import NO_LIMIT, RANKED_SLOTS, Height, Limits, Machine

# KiB of shared memory of one program, and of a multiprocessor for all its programs, each of which costs 1 KiB
# more (CUDA programming guide, table of technical specifications).
SHARED = {80: (163, 164), 86: (99, 100), 90: (227, 228), 100: (227, 228)}
REGISTERS = 65536  # of a multiprocessor
SMALL = {"gate_up_small", "down_small"}
TILED = {"permute_kernel", "gate_up_tiled", "down_tiled"}
MANY_SLOTS = {"count_kernel", "scan_kernel", "place_kernel", "weighted_sum_kernel"}
GPT_OSS = Activation("silu", limit=7.0, alpha=1.702, beta=1.0)
CASES = {
    # name: arch, dtype, tokens, activation, bias, kernels that it needs
    "few": (
        90,
        torch.bfloat16,
        16,
        Activation("silu"),
        False,
        {"rank_kernel", "weighted_sum_kernel"} | SMALL,
    ),
    "vector": (90, torch.bfloat16, 1, GPT_OSS, True, {"gate_up_vector", "down_vector"}),
    "many": (90, torch.bfloat16, 4096, GPT_OSS, True, MANY_SLOTS | SMALL | TILED),
    "fp16": (90, torch.float16, 4096, Activation("gelu", gated=False), False, MANY_SLOTS | SMALL | TILED),
    "fp32": (90, torch.float32, 4096, Activation("silu"), True, MANY_SLOTS | SMALL | TILED),
    "ampere": (80, torch.bfloat16, 4096, GPT_OSS, True, MANY_SLOTS | SMALL | TILED),
    "ada": (86, torch.bfloat16, 4096, Activation("silu"), False, MANY_SLOTS | SMALL | TILED),
    "blackwell": (100, torch.bfloat16, 4096, Activation("silu"), True, MANY_SLOTS | SMALL | TILED),
}


def launches(arch, dtype, tokens, activation, bias, tall=False, heights=()):
    """Compile a layer of 16 experts, 4 a token; each expert gets about tokens / 4 rows."""
    machine = Machine(sms=132, capability=divmod(arch, 10))
    spec = ExpertSpec(16, 256, 320, dtype, activation, bias=bias)
    kernel = TritonExperts(spec, machine=machine)
    kernel.table = replace(kernel.table, tall=tall, heights=heights)
    for e in range(16):
        biases = [torch.zeros(n) for n in (activation.gate_up_rows(320), 256) if bias]
        kernel.load_expert(e, torch.zeros(activation.gate_up_rows(320), 256), torch.zeros(256, 320), *biases)
    ids = torch.zeros(tokens, 4, dtype=torch.int32)
    x = ExpertInput(torch.zeros(tokens, 256, dtype=dtype), ids, torch.ones(tokens, 4), torch.arange(tokens))
    with compiling(arch) as found:
        kernel.compute(x)
    return kernel.table, found


RANKED = {"rank_kernel"}
SORTS = {8: RANKED, 512: RANKED, 4096: RANKED, 8192: MANY_SLOTS, 1024: {"sort_kernel"}, 1025: MANY_SLOTS}


@pytest.mark.parametrize("limits", [Limits(16, 64), Limits(NO_LIMIT, NO_LIMIT), Limits(0, 0)], ids=str)
@pytest.mark.parametrize("slots", SORTS)
def test_sorts_compile_without_spilling(slots, limits):
    tiles = default_table(Machine(132, (9, 0)), torch.bfloat16, 64).gate_up
    with compiling(90) as found:
        plan_tiles(
            torch.zeros(slots, 1, dtype=torch.int32), 256, tiles, limits, True,
            ranked_slots=0 if slots in (1024, 1025) else RANKED_SLOTS,
        )  # fmt: skip
    assert {kernel.name for kernel in found} == SORTS[slots] - {"weighted_sum_kernel"}
    assert all(kernel.spilt == 0 for kernel in found)


# Bytes a thread that tall tiles may spill, once a tile, for a bias or a long activation.
TALL_SPILL = 96


@pytest.mark.parametrize(
    ("name", "tall"),
    [*((name, False) for name in CASES), *((name, True) for name in ("many", "fp16", "blackwell"))],
)
def test_compiles_without_spilling(name, tall):
    arch, dtype, tokens, activation, bias, needed = CASES[name]
    table, found = launches(arch, dtype, tokens, activation, bias, tall)
    assert {kernel.name for kernel in found} == needed
    for kernel in found:
        assert kernel.spilt <= (TALL_SPILL if tall and kernel.name in TILED else 0), (
            f"{kernel.name}: {kernel.spilt} bytes a thread"
        )
        assert kernel.shared <= SHARED[arch][0] << 10, (
            f"{kernel.name}: {kernel.shared} bytes of shared memory"
        )
    for stage in ("gate_up", "down"):
        its = [kernel for kernel in found if kernel.name in (f"{stage}_small", f"{stage}_tiled")]
        tiles = getattr(table, stage)[1:] if tokens > 64 else getattr(table, stage)[: len(its)]
        for kernel, tile in zip(its, tiles, strict=True):
            assert tile.per_sm * (kernel.shared + 1024) <= SHARED[arch][1] << 10, (kernel.name, tile)
            assert tile.per_sm * kernel.registers * kernel.warps * 32 <= REGISTERS, (kernel.name, tile)
            if arch == 90:
                check_hopper(kernel, tile, dtype)


FORMS = {f"height{n}": (height.tiles, 90) for n, height in enumerate(HOPPER_HEIGHTS)}
FORMS |= {"gathered": (replace(HOPPER_HEIGHTS[3].tiles, gathered=True), 90)}


@pytest.mark.parametrize("activation", [Activation("silu"), GPT_OSS], ids=["silu", "gpt-oss"])
@pytest.mark.parametrize("name", FORMS)
def test_heights_compile_without_spilling(name, activation):
    tiles, arch = FORMS[name]
    bias = activation is GPT_OSS
    heights = (Height(NO_LIMIT, tiles),)
    _, found = launches(arch, torch.bfloat16, 4096, activation, bias, heights=heights)
    copied = {"permute_kernel"} if not (tiles.swapped or tiles.gathered) else set()
    form = "small" if tiles.swapped else "tiled"
    first = "gathered" if tiles.gathered else form
    assert {k.name for k in found} == {f"gate_up_{first}", f"down_{form}"} | copied | MANY_SLOTS
    for kernel in found:
        assert kernel.spilt <= (TALL_SPILL if tiles.tall and kernel.name in TILED else 0), kernel.name
    products = [k for k in found if k.name.startswith(("gate_up", "down"))]
    for kernel, tile in zip(products, (tiles.gate_up, tiles.down), strict=True):
        assert kernel.shared <= SHARED[arch][0] << 10, f"{kernel.name}: {kernel.shared} bytes"
        assert tile.per_sm * (kernel.shared + 1024) <= SHARED[arch][1] << 10, (kernel.name, tile)
        assert tile.per_sm * kernel.registers * kernel.warps * 32 <= REGISTERS, (kernel.name, tile)
        check_hopper(kernel, tile, torch.bfloat16)
        if kernel.name in SMALL | {"gate_up_gathered"}:
            assert "cp.async.cg.shared.global" in kernel.ptx, f"{kernel.name} waits for its rows"


@pytest.mark.parametrize(("hidden", "width"), [(2880, 2880), (4096, 1536)])
def test_vectors_of_wide_experts_compile_without_spilling(hidden, width):
    spec = ExpertSpec(4, hidden, width, torch.bfloat16, GPT_OSS, bias=True)
    kernel = TritonExperts(spec, machine=Machine(132, (9, 0)))
    kernel._missing.clear()
    ids = torch.zeros(1, 4, dtype=torch.int32)
    with compiling(90) as found:
        kernel.compute(ExpertInput(torch.zeros(1, hidden, dtype=torch.bfloat16), ids, torch.ones(1, 4)))
    assert [k.name for k in found] == ["gate_up_vector", "down_vector"]
    assert all(k.spilt == 0 and k.registers <= 128 and k.shared <= 56 << 10 for k in found)


@pytest.mark.parametrize("tokens", [2, 64, 1024])
@pytest.mark.parametrize("gathered", [False, True])
def test_dependent_launches_wait_before_they_touch_memory(tokens, gathered):
    """All launches of a call wait for the one before, so that each may count on all earlier ones."""
    spec = ExpertSpec(16, 256, 320, torch.bfloat16, GPT_OSS, bias=True)
    kernel = TritonExperts(spec, machine=Machine(132, (9, 0)))
    kernel._missing.clear()
    many = replace(HOPPER_HEIGHTS[3].tiles, gathered=gathered)
    heights = (*HOPPER_HEIGHTS[:3], Height(NO_LIMIT, many))
    x = ExpertInput(
        torch.zeros(tokens, 256, dtype=torch.bfloat16), torch.zeros(tokens, 4, dtype=torch.int32),
        torch.ones(tokens, 4), torch.arange(tokens),
    )  # fmt: skip
    for dependent in (False, True):
        kernel.table = replace(kernel.table, dependent=dependent, heights=heights)
        with compiling(90) as found:
            kernel.compute(x)
        assert len(found) == {2: 2, 64: 4, 1024: 4 if gathered else 5}[tokens]
        for k in found:
            body = k.ptx[k.ptx.index(".entry") :]
            at = body.find("griddepcontrol.wait")
            assert (at >= 0) == dependent, k.name
            body = body.replace("cp.async.bulk.prefetch", "prefetch")  # it is of weights
            touch = re.search(r"\b(?:ld|st|atom|red)\.(?:volatile\.)?global|cp\.async|tensormap", body)
            assert not dependent or at < touch.start(), f"{k.name} reads or writes before it waits"
            assert ("griddepcontrol.launch_dependents" in body) == dependent


@pytest.mark.parametrize(("hidden", "width", "tokens"), [(256, 320, 64), (24, 8, 64), (256, 320, 8)])
def test_weights_are_fetched_while_a_launch_waits(hidden, width, tokens):
    """Where most experts have rows, at most a row's bytes; the launches are those that wait."""
    kernel = TritonExperts(
        ExpertSpec(16, hidden, width, torch.bfloat16, GPT_OSS), machine=Machine(132, (9, 0))
    )
    kernel._missing.clear()
    x = ExpertInput(
        torch.zeros(tokens, hidden, dtype=torch.bfloat16), torch.zeros(tokens, 4, dtype=torch.int32),
        torch.ones(tokens, 4),
    )  # fmt: skip
    kernel.table = replace(kernel.table, dependent=True, prefetch=128)
    with compiling(90) as found:
        kernel.compute(x)
    for name, length in (("gate_up_small", hidden), ("down_small", width)):
        ptx = next(k.ptx for k in found if k.name == name)
        assert ("cp.async.bulk.prefetch.L2.global" in ptx) == (tokens == 64)
        if tokens == 64:
            at = ptx.index("cp.async.bulk.prefetch.L2.global")
            assert at < ptx.index("griddepcontrol.wait")
            size = re.search(r"cp\.async\.bulk\.prefetch\.L2\.global \[%\w+\], (%\w+)", ptx).group(1)
            moved = re.search(rf"mov\.b32\s+{size}, (\d+)", ptx).group(1)
            assert int(moved) == min(128, 2 * length)


def check_hopper(kernel, tile, dtype):
    """Check for the instructions that the tiles were chosen for."""
    assert "cp.async.bulk.tensor" in kernel.ptx, f"{kernel.name} copies no tensor tiles"
    if dtype != torch.float32:
        assert "wgmma.mma_async" in kernel.ptx, f"{kernel.name} does not use the matrix unit of warp groups"
    assert kernel.warps == tile.warps, f"{kernel.name}: warps of their own for copies, which compute garbage"
    check_copies(kernel)


def check_copies(kernel):
    """Check that each tensor copy fills its buffer; Triton 3.6 was seen to compile boxes of another shape."""
    pattern = r"async_tma_copy_global_to_local .*: !tt\.tensordesc<(?:tensor<)?([\dx]+)x\w+.*-> "
    copies = re.findall(pattern + r"!ttg\.memdesc<([\dx]+)x", kernel.ttgir)
    assert copies, "no copies found: has their text changed?"
    for box, buffer in copies:
        assert box == buffer, f"{kernel.name}: a box of {box} into a buffer of {buffer}"


def test_batch_sizes_share_code():
    """Another number of tokens compiles nothing new: arguments that depend on it are not specialised."""
    keys = []
    for tokens in (2100, 4096, 8192):
        _, found = launches(90, torch.bfloat16, tokens, Activation("silu"), False)
        keys.append([(kernel.name, kernel.ptx) for kernel in found])
    assert keys[0] == keys[1] == keys[2]


def test_a_wide_tile_would_be_seen_to_spill():
    """A tile too large for its registers is reported, so the figures above mean something."""
    import triton_compiler

    machine = Machine(sms=132, capability=(9, 0))
    kernel = TritonExperts(ExpertSpec(4, 256, 256, torch.bfloat16, Activation("silu")), machine=machine)
    wide = replace(kernel.table.gate_up[2], columns=256, stages=2)
    kernel.table = replace(kernel.table, gate_up=(*kernel.table.gate_up[:2], wide), heights=())
    for expert in range(4):
        kernel.load_expert(expert, torch.zeros(512, 256), torch.zeros(256, 256))
    ids = torch.zeros(256, 2, dtype=torch.int32)
    with triton_compiler.compiling(90) as found:
        kernel.compute(ExpertInput(torch.zeros(256, 256, dtype=torch.bfloat16), ids, torch.ones(256, 2)))
    assert next(k for k in found if k.name == "gate_up_tiled").spilt > 0
