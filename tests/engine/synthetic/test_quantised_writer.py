"""Quantised checkpoints that xpar writes: as published, and as near to the floats as the format allows."""

import json
from pathlib import Path

import pytest
import torch

from xpar.engine.checkpoint.reader import Checkpoint
from xpar.engine.checkpoint.tensor_file import CheckpointError
from xpar.engine.formats.published import FORMS
from xpar.engine.synthetic.checkpoint import make_checkpoint
from xpar.kernels.quantisation import quantise

SIZES = {"layers": 1, "experts": 4, "hidden": 64, "intermediate": 96, "top_k": 2}
ERRORS = {
    "fp8": 0.0265,
    "fp8-channel": 0.0265,
    "int4": 0.095,
    "gptq": 0.111,
    "awq": 0.100,
    "nvfp4": 0.095,
    "fp4": 0.115,
    "mxfp4": 0.115,
}
"""Root mean square errors on Gaussian weights, relative; of int4 in groups of 128 but for ``int4``."""


@pytest.mark.parametrize("name", FORMS)
def test_error_on_gaussian_weights(name: str, fresh_seed: int) -> None:
    weight = torch.randn(384, 512, generator=torch.Generator().manual_seed(fresh_seed))
    found = quantise(weight, FORMS[name].weight_format([512])).dequantise()
    error = float((found - weight).norm() / weight.norm())
    assert 0.9 * ERRORS[name] < error < 1.1 * ERRORS[name]


@pytest.mark.parametrize("name", FORMS)
def test_a_weight_of_zeros(name: str) -> None:
    weight = quantise(torch.zeros(8, 128), FORMS[name].weight_format([128]))
    assert torch.equal(weight.dequantise(), torch.zeros(8, 128))
    assert bool((weight.scales.float() > 0).all())


PUBLISHED = {
    "deepseek_v3": None,
    "minimax_m2": ["gate", "e_score_correction_bias", "lm_head"],
    "qwen3_moe": ["model.layers.0.mlp.gate", "model.embed_tokens", "lm_head"],
}


@pytest.mark.parametrize("family", PUBLISHED)
def test_what_the_config_lists_as_left_out(tmp_path: Path, family: str) -> None:
    make_checkpoint(family, tmp_path / "c", **SIZES, form="fp8", writer="own")
    config = json.loads((tmp_path / "c" / "config.json").read_text())["quantization_config"]
    listed = config.get("modules_to_not_convert")
    assert listed is PUBLISHED[family] or set(listed) == set(PUBLISHED[family])
    assert config["weight_block_size"] == [128, 128]
    with Checkpoint(tmp_path / "c") as stored:
        scaled = {n.removesuffix("_scale_inv") for n in stored.names() if n.endswith("_scale_inv")}
        assert all(stored.entry(name).dtype == "F8_E4M3" for name in scaled)
        assert {name.split(".")[3] for name in scaled if ".layers." in name} >= {"self_attn"}
        assert not [
            name for name in scaled if name.endswith((".gate.weight", "norm.weight", "lm_head.weight"))
        ]


WRONG = {
    "no format": ("qwen3_moe", "fp9", {}, r"format 'fp9' cannot be written; choose one of fp8, fp8-channel"),
    "stacked": ("gpt_oss", "fp8-channel", {}, r"its experts are stacked in one tensor"),
    "not stacked": ("qwen3_moe", "mxfp4", {}, r"its experts are not stacked in one tensor"),
    "no group": (
        "qwen3_moe",
        "gptq",
        {"hidden": 72, "intermediate": 40},
        r"no group of 128, 64, 32, 16",
    ),
    "half a block": ("gpt_oss", "mxfp4", {"intermediate": 48}, r"width 48 must be a multiple of 32"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_format_that_does_not_fit(tmp_path: Path, name: str) -> None:
    family, form, sizes, message = WRONG[name]
    with pytest.raises(CheckpointError, match=message):
        make_checkpoint(family, tmp_path / "c", **{**SIZES, **sizes}, form=form, writer="own")
    assert not list(tmp_path.glob("c/*"))
