"""compressed-tensors' own decompression as a second opinion of what its files mean."""

import json
from pathlib import Path

import pytest
import torch
from quantised_cases import CASES, Case
from safetensors.torch import save_file

from xpar.engine.formats.quantised_checkpoint import open_checkpoint

pytest.importorskip("compressed_tensors", reason="pip install compressed-tensors")
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationScheme

NAME = "model.layers.0.m.down"
CUT_GROUPS = ("ct-int4-odd", "ct-int8-g32")
"""The library refuses a last group that is not whole."""
REORDERED = "ct-int4-actorder"
"""Its newest version knows no groups of inputs in another order."""
THEIRS = [
    case
    for case in CASES
    if case.config.get("quant_method") == "compressed-tensors" and case.name not in (*CUT_GROUPS, REORDERED)
]


def scheme_of(case: Case) -> QuantizationScheme:
    return QuantizationScheme(**case.config["config_groups"]["group_0"])


def decompress(case: Case, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    compressor = BaseCompressor.get_value_from_registry(case.config["format"])
    state = {name.removeprefix("."): tensor.clone() for name, tensor in tensors.items()}
    weight: torch.Tensor = compressor.decompress(state, scheme_of(case))["weight"]
    return weight


@pytest.mark.parametrize("case", THEIRS, ids=lambda case: case.name)
def test_their_weight_is_ours_but_for_a_rounding(case: Case, tmp_path: Path, fresh_seed: int) -> None:
    tensors = case.make(torch.Generator().manual_seed(fresh_seed))
    if case.name == "ct-mxfp4":
        # The library decodes in bfloat16, where 2^128 is infinite and 6 times the least scale is no number.
        tensors[".weight_scale"].clamp_(90, 150)
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": case.config}))
    stored = {NAME + suffix: tensor.contiguous() for suffix, tensor in tensors.items()}
    save_file(stored, tmp_path / "model.safetensors")
    ours = open_checkpoint(tmp_path).read(f"{NAME}.weight")
    theirs = decompress(case, tensors)
    # The library multiplies in the dtype of the scale.
    rounding = 2.4e-7 if theirs.dtype == torch.float32 else 2.0**-7
    torch.testing.assert_close(ours, theirs.float(), rtol=rounding, atol=0.0)


def test_a_file_that_they_wrote(tmp_path: Path, fresh_seed: int) -> None:
    """Asymmetric 4-bit codes of a weight whose outputs and inputs are no multiples of a word."""
    case = next(case for case in THEIRS if case.name == "ct-int4-asymmetric")
    generator = torch.Generator().manual_seed(fresh_seed)
    scale = torch.rand(33, 3, generator=generator) + 0.1
    state = {
        "weight": torch.randn(33, 96, generator=generator),
        "weight_scale": scale,
        "weight_zero_point": torch.randint(-8, 8, (33, 3), generator=generator).to(torch.int8),
    }
    compressor = BaseCompressor.get_value_from_registry(case.config["format"])
    compressed = compressor.compress(dict(state), scheme_of(case))
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": case.config}))
    save_file(
        {f"{NAME}.{name}": tensor.contiguous() for name, tensor in compressed.items()},
        tmp_path / "model.safetensors",
    )
    ours = open_checkpoint(tmp_path).read(f"{NAME}.weight")
    torch.testing.assert_close(ours, compressor.decompress(compressed, scheme_of(case))["weight"])
