"""The choice of an expert kernel, and its reasons."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from xpar.kernels.contracts import Activation, ExpertSpec
from xpar.kernels.quantised_weight import ActivationScheme, CodeType, WeightFormat
from xpar.kernels.registry import KERNELS, choose_kernel

SPEC = ExpertSpec(8, 128, 192, torch.bfloat16, Activation("silu"))
ANYWHERE = tuple(
    replace(r, why_unavailable=lambda spec: None, why_unsuitable=lambda spec: None)
    for r in KERNELS
    if "cpu" in r.devices
)


def test_every_kernel_is_chosen_or_explained():
    choice = choose_kernel(SPEC)
    names = [choice.name, *(name for name, _ in choice.rejected)]
    assert sorted(names) == sorted(entry.name for entry in KERNELS)
    lines = choice.explain().splitlines()
    assert len(lines) == len(KERNELS) and lines[0].startswith(f"{choice.name}: chosen")
    assert all("passed over, " in line for line in lines[1:])


@pytest.mark.parametrize(
    "change,chosen,reason",
    [
        ({}, "zentorch", None),
        ({"dtype": torch.float32}, "onednn", "computes in bfloat16, not in float32"),
        ({"row_invariant": True}, "native", "exact mode"),
        ({"device": "cuda:1"}, "reference", "runs on cpu, not on cuda"),
    ],
    ids=["bf16", "fp32", "exact", "cuda"],
)
def test_the_first_that_serves_is_chosen(change, chosen, reason):
    choice = choose_kernel(replace(SPEC, **change), kernels=ANYWHERE)
    assert choice.name == chosen
    if reason:
        assert reason in dict(choice.rejected)["zentorch"]


def test_a_missing_processor_feature_is_a_reason():
    lacking = (
        replace(ANYWHERE[0], why_unavailable=lambda spec: "this processor has no avx512_bf16"),
        *ANYWHERE[1:],
    )
    choice = choose_kernel(SPEC, kernels=lacking)
    assert choice.name == "native"
    assert choice.rejected[0] == ("zentorch", "this processor has no avx512_bf16")


def test_an_unsuitable_kernel_serves_by_name_only():
    slower = tuple(
        replace(r, why_unsuitable=lambda spec: "slower here") if r.name == "native" else r
        for r in ANYWHERE[1:]
    )
    choice = choose_kernel(SPEC, kernels=slower)
    assert choice.name == "onednn" and choice.rejected[0] == ("native", "slower here")
    assert choose_kernel(SPEC, "native", kernels=slower).name == "native"


def test_zentorch_refuses_shapes_it_was_not_checked_with():
    zen = next(entry for entry in KERNELS if entry.name == "zentorch")
    assert zen.why_not(replace(SPEC, intermediate_size=100)) is not None


def test_a_name_chooses_that_kernel_or_says_why_not():
    choice = choose_kernel(SPEC, "reference")
    assert choice.name == "reference"
    assert all(reason for _, reason in choice.rejected)
    with pytest.raises(ValueError, match=r"zentorch.*float32.*choose auto or one of onednn"):
        choose_kernel(replace(SPEC, dtype=torch.float32), "zentorch")
    with pytest.raises(ValueError, match=r"'mkl': there is none of that name.*onednn"):
        choose_kernel(SPEC, "mkl")


def test_the_error_gives_every_kernels_reason():
    with pytest.raises(ValueError, match=r"no kernel serves .*\n  zentorch: .*\n  native: .*\n  onednn: "):
        choose_kernel(replace(SPEC, dtype=torch.float64))


BLOCKS = WeightFormat(CodeType.E4M3, (128, 128), torch.float32)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({}, None),
        ({"weight_format": BLOCKS, "activation_scheme": ActivationScheme()}, None),
        ({"weight_format": BLOCKS}, None),
        ({"weight_format": BLOCKS, "activation_scheme": ActivationScheme(), "row_invariant": True}, None),
        ({"weight_format": WeightFormat(CodeType.INT4, (1, 128), torch.bfloat16)}, None),
        ({"weight_format": WeightFormat(CodeType.INT8, (1, 0), torch.bfloat16)}, "int8"),
    ],
    ids=["plain", "fp8 activations", "weights alone", "exact", "int4", "int8"],
)
def test_formats_that_a_gpu_computes_from(
    change: dict[str, Any], reason: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    triton = next(entry for entry in KERNELS if entry.name == "triton")
    found = triton.why_not(replace(SPEC, device="cuda:0", **change))
    assert found is None if reason is None else reason in str(found)
