"""The small operations of a step compiled for GPUs that this machine need not have: nothing spills."""

import re

import pytest
import torch
from triton_compiler import compiling

from xpar.kernels.gpu.rotary import rotate
from xpar.kernels.gpu.small_steps import check_routing, count_slots, write_spans


@pytest.mark.parametrize("arch", [80, 90, 100])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("width", [64, 128, 192])
def test_compiles_without_spilling(width, dtype, arch):
    q, k = torch.zeros(2, 16, 1, width, dtype=dtype), torch.zeros(2, 4, 1, width, dtype=dtype)
    cos = torch.zeros(2, 1, 64, dtype=dtype)
    ids, pool = torch.zeros(2, 8, dtype=torch.int64), torch.zeros(32, 4, width, dtype=dtype)
    with compiling(arch) as found:
        rotate(q, k, cos, cos, False)
        routing = check_routing(ids, torch.zeros(2, 8, dtype=dtype), torch.zeros(2, dtype=torch.bool), 64)
        count_slots(routing.topk_ids, torch.zeros((), dtype=torch.int64))
        write_spans(k[:, :, 0].transpose(0, 1), k[:, :, 0].transpose(0, 1), pool, pool, torch.arange(2))
    names = {"rotary_kernel", "check_routing_kernel", "count_slots_kernel", "write_spans_kernel"}
    assert {kernel.name for kernel in found} == names
    assert all(kernel.spilt == 0 for kernel in found)
    rotary = next(kernel for kernel in found if kernel.name == "rotary_kernel")
    # Ampere multiplies bfloat16 by an addition of nothing.
    assert arch == 80 or not re.search(r"\bfma\.rn\.(f32|b?f16)", rotary.ptx), (
        "a product is not rounded by itself"
    )
