"""The kernels of rows that travel as words compiled for GPUs that this machine need not have."""

import pytest
import torch
from triton_compiler import compiling

from xpar.kernels.gpu.coded_rows import decode_rows, encode_rows, split_words
from xpar.kernels.quantised_weight import ActivationScheme
from xpar.kernels.row_format import RowFormat


@pytest.mark.parametrize("group", [0, 128])
@pytest.mark.parametrize("arch", [80, 90, 100])
def test_kernels_of_words_compile_without_spills(arch, group):
    form, has_dot8 = RowFormat(7168, ActivationScheme(group)), arch >= 89
    x, rows = torch.zeros(256, 7168, dtype=torch.bfloat16), torch.arange(100)
    with compiling(arch) as found:
        words = encode_rows(x, form, has_dot8=has_dot8)
        split_words(words, None, form, 7168, has_dot8=has_dot8)
        decode_rows(words, rows, form, torch.bfloat16, has_dot8=has_dot8)
    assert len(found) == 3 and all(kernel.spilt == 0 for kernel in found)
    split = next(kernel for kernel in found if "split" in kernel.name)
    assert "ld.global.v4.b32" in split.ptx, "codes do not move 16 bytes at once"
