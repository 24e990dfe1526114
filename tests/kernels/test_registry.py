"""Choosing a kernel, and saying why."""

from dataclasses import replace

import pytest
import torch

from xpar.kernels.contracts import Activation, ExpertSpec
from xpar.kernels.registry import KERNELS, choose

SPEC = ExpertSpec(8, 128, 192, torch.bfloat16, Activation("silu"))
ANYWHERE = tuple(
    replace(r, unavailable=lambda spec: None, outdone=lambda spec: None)
    for r in KERNELS
    if "cpu" in r.devices
)


def test_every_kernel_is_chosen_or_explained():
    choice = choose(SPEC)
    names = [choice.record.name, *(name for name, _ in choice.rejected)]
    assert sorted(names) == sorted(record.name for record in KERNELS)
    lines = choice.explain().splitlines()
    assert len(lines) == len(KERNELS) and lines[0].startswith(f"{choice.record.name}: chosen")
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
def test_first_that_fits(change, chosen, reason):
    choice = choose(replace(SPEC, **change), kernels=ANYWHERE)
    assert choice.record.name == chosen
    if reason:
        assert reason in dict(choice.rejected)["zentorch"]


def test_what_the_machine_lacks_is_a_reason():
    lacking = (
        replace(ANYWHERE[0], unavailable=lambda spec: "this processor has no avx512_bf16"),
        *ANYWHERE[1:],
    )
    choice = choose(SPEC, kernels=lacking)
    assert choice.record.name == "native"
    assert choice.rejected[0] == ("zentorch", "this processor has no avx512_bf16")


def test_what_is_outdone_serves_by_name_only():
    slower = tuple(
        replace(r, outdone=lambda spec: "slower here") if r.name == "native" else r for r in ANYWHERE[1:]
    )
    choice = choose(SPEC, kernels=slower)
    assert choice.record.name == "onednn" and choice.rejected[0] == ("native", "slower here")
    assert choose(SPEC, "native", kernels=slower).record.name == "native"


def test_shapes_that_zentorch_was_not_checked_on():
    zen = next(record for record in KERNELS if record.name == "zentorch")
    assert zen.refuses(replace(SPEC, intermediate_size=100)) is not None


def test_by_name():
    choice = choose(SPEC, "reference")
    assert choice.record.name == "reference"
    assert all(reason for _, reason in choice.rejected)
    with pytest.raises(ValueError, match=r"zentorch.*float32.*one of zentorch, native, onednn"):
        choose(replace(SPEC, dtype=torch.float32), "zentorch")
    with pytest.raises(ValueError, match=r"'mkl': there is none of that name.*onednn"):
        choose(SPEC, "mkl")


def test_none_fits():
    with pytest.raises(ValueError, match=r"no kernel serves .*\n  zentorch: .*\n  native: .*\n  onednn: "):
        choose(replace(SPEC, dtype=torch.float64))
