"""Codes and scales of an expert's slice against the same slice read as floats."""

from pathlib import Path
from typing import Any

import pytest
import torch

from xpar.engine.architectures.layer_config import find
from xpar.engine.architectures.mlp_weights import MlpPlace, mlp_buffers, read_mlp
from xpar.engine.architectures.quantised_mlp import quantised_format, read_quantised_mlp
from xpar.engine.architectures.stored_names import resolve_names
from xpar.engine.formats.quantised_checkpoint import open_checkpoint
from xpar.engine.synthetic.checkpoint import make_checkpoint
from xpar.kernels.quantised_weight import CodeType, WeightFormat

F32, BF16, HALF = torch.float32, torch.bfloat16, torch.float16
E8M0 = torch.float8_e8m0fnu
WIDE: dict[str, Any] = {"hidden": 160, "intermediate": 320}
SMALL: dict[str, Any] = {"hidden": 64, "intermediate": 96}
CASES = {
    "whole": ("qwen3_moe", "fp8", WIDE, slice(0, 320), WeightFormat(CodeType.E4M3, (64, 128), F32)),
    "whole blocks": ("qwen3_moe", "fp8", WIDE, slice(128, 256), WeightFormat(CodeType.E4M3, (128, 128), F32)),
    "smaller blocks": ("qwen3_moe", "fp8", WIDE, slice(64, 160), WeightFormat(CodeType.E4M3, (32, 32), F32)),
    "rows": ("glm4_moe", "fp8-channel", SMALL, slice(5, 18), WeightFormat(CodeType.E4M3, (1, 0), BF16)),
    "int4": ("deepseek_v3", "int4", SMALL, slice(32, 96), WeightFormat(CodeType.INT4, (1, 32), BF16)),
    "gptq": ("qwen3_moe", "gptq", SMALL, slice(32, 64), WeightFormat(CodeType.INT4, (1, 32), HALF)),
    "awq": ("qwen3_moe", "awq", SMALL, slice(64, 96), WeightFormat(CodeType.INT4, (1, 32), HALF, True)),
    "nvfp4": ("qwen3_moe", "nvfp4", SMALL, slice(16, 48), WeightFormat(CodeType.E2M1, (1, 16), F32)),
    "mxfp4": ("gpt_oss", "mxfp4", SMALL, slice(32, 64), WeightFormat(CodeType.E2M1, (1, 32), E8M0)),
    "inside a word": ("deepseek_v3", "int4", SMALL, slice(4, 96), None),
    "floats": ("qwen3_moe", None, SMALL, slice(0, 96), None),
}


@pytest.mark.parametrize("name", CASES)
def test_a_slice_in_codes_is_that_in_floats(tmp_path: Path, fresh_seed: int, name: str) -> None:
    family, form, sizes, rows, expected = CASES[name]
    sizes = {"layers": 2, "experts": 4, "top_k": 2, **sizes}
    make_checkpoint(family, tmp_path / "c", **sizes, seed=fresh_seed, form=form, writer="own", dtype=F32)
    with open_checkpoint(tmp_path / "c") as checkpoint:
        names = resolve_names(checkpoint, find(checkpoint.config), 1).experts
        place = MlpPlace(names, 1, sizes["hidden"], sizes["intermediate"], rows, 3, experts=4)
        found = quantised_format(checkpoint, place)
        assert found == expected
        if found is None:
            return
        out = mlp_buffers(place, F32)
        read_mlp(checkpoint, place, out)
        gate_up, down = read_quantised_mlp(checkpoint, place, found)
    assert gate_up.format == down.format == found
    torch.testing.assert_close(gate_up.dequantise(), out.gate_up, rtol=2.4e-7, atol=0.0)
    torch.testing.assert_close(down.dequantise(), out.down, rtol=2.4e-7, atol=0.0)
