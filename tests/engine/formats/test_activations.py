"""What published configurations say about the inputs of experts."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from quantised_cases import MODELOPT, group

from xpar.engine.config import WEIGHTS_ALONE, StoredActivations
from xpar.engine.formats.quantised_checkpoint import open_checkpoint
from xpar.engine.formats.schemes import schemes_of
from xpar.engine.synthetic.checkpoint import make_checkpoint
from xpar.kernels.quantised_weight import ActivationScheme

FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic"}
BLOCK = {**FP8, "weight_block_size": [128, 128]}
BY_128, BY_TOKEN = StoredActivations(ActivationScheme()), StoredActivations(ActivationScheme(0))
OF_BATCH = StoredActivations(ActivationScheme(0), is_of_batch=True)


def compressed(**inputs: Any) -> dict[str, Any]:
    config = group("float-quantized", 8, "float", strategy="channel")
    made = {"num_bits": 8, "type": "float", "dynamic": True, **inputs}
    config["config_groups"]["group_0"]["input_activations"] = made
    return config


SAID: dict[str, tuple[dict[str, Any], StoredActivations]] = {
    "deepseek-v3": (BLOCK, BY_128),
    "deepseek-v3.1": ({**BLOCK, "scale_fmt": "ue8m0"}, StoredActivations(ActivationScheme(128, True))),
    "fp8 blocks without a word": ({"quant_method": "fp8", "weight_block_size": [128, 128]}, BY_128),
    "fp8 tensor": (FP8, OF_BATCH),
    "fbgemm": ({"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0}, BY_TOKEN),
    "glm-4.5": (compressed(strategy="token"), BY_TOKEN),
    "ct block": (compressed(strategy="group", group_size=128), BY_128),
    "ct batch": (compressed(strategy="tensor"), OF_BATCH),
    "ct weights": (group("float-quantized", 8, "float", strategy="channel"), WEIGHTS_ALONE),
    "kimi": (group("pack-quantized", 4, "int", strategy="group", group_size=32), WEIGHTS_ALONE),
    "gpt-oss": ({"quant_method": "mxfp4"}, WEIGHTS_ALONE),
    "gptq": ({"quant_method": "gptq", "bits": 4, "group_size": 128}, WEIGHTS_ALONE),
    "awq": ({"quant_method": "awq", "bits": 4, "group_size": 128}, WEIGHTS_ALONE),
    "modelopt": (MODELOPT, WEIGHTS_ALONE),
}
REFUSED = {
    "fp8 static": ({**FP8, "activation_scheme": "static"}, "one static scale a tensor"),
    "ct static": (compressed(strategy="tensor", dynamic=False), "one static scale a tensor"),
    "fp8 tensor without a word": ({"quant_method": "fp8"}, "activation_scheme=None says nothing"),
    "other blocks": ({**BLOCK, "weight_block_size": [64, 64]}, "scales for 64 values of them"),
    "mxfp8": ({"quant_method": "mxfp8"}, "scales for 32 values of them"),
    "w8a8 int8": (compressed(type="int", strategy="token"), r"codes of 8 bits \(int\)"),
    "nvfp4": (compressed(num_bits=4, dynamic="local", strategy="tensor_group"), "codes of 4 bits"),
}


def said_by(config: dict[str, Any]) -> StoredActivations:
    scheme = schemes_of(config)("model.layers.0.mlp.experts.0.up_proj")
    assert scheme is not None
    return scheme.activations


@pytest.mark.parametrize("name", SAID)
def test_the_scheme_is_what_config_json_says(name: str) -> None:
    config, expected = SAID[name]
    assert said_by(config) == expected


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_computed_says_why(name: str) -> None:
    config, why = REFUSED[name]
    found = said_by(config)
    assert found.scheme is None
    assert re.search(why, found.why_not), found.why_not


SIZES = {"layers": 1, "experts": 2, "hidden": 128, "intermediate": 128, "top_k": 1, "vocab": 16}
WRITTEN = {
    "fp8": ("qwen3_moe", BY_128),
    "fp8-channel": ("qwen3_moe", BY_TOKEN),
    "awq": ("qwen3_moe", WEIGHTS_ALONE),
    "mxfp4": ("gpt_oss", WEIGHTS_ALONE),
}


@pytest.mark.parametrize("form", WRITTEN)
def test_a_checkpoint_says_it_of_its_experts(form: str, tmp_path: Path) -> None:
    family, expected = WRITTEN[form]
    make_checkpoint(family, tmp_path, **SIZES, seed=0, form=form)  # type: ignore[arg-type]
    with open_checkpoint(tmp_path) as checkpoint:
        assert checkpoint.expert_inputs() == expected


def test_floats_and_nibbles_take_inputs_as_they_are(tmp_path: Path) -> None:
    """fp4 experts stand beside fp8 layers whose inputs are quantised."""
    make_checkpoint("qwen3_moe", tmp_path / "floats", **SIZES, seed=0, dtype=torch.bfloat16)  # type: ignore[arg-type]
    make_checkpoint("deepseek_v4", tmp_path / "fp4", **SIZES, seed=0, form="fp4")  # type: ignore[arg-type]
    for name, why in (("floats", "the experts are plain numbers"), ("fp4", "codes, which take floats")):
        with open_checkpoint(tmp_path / name) as checkpoint:
            found = checkpoint.expert_inputs()
        assert found.scheme is None and why in found.why_not
