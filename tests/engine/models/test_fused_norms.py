"""Norms that are no RMS norms are left alone, and the forms of those that are get found."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from xpar.engine.models.fused_norms import NormForm, find_norm_form
from xpar.engine.models.fused_ops import FusedModules, fuse_operations


class AlteredNorm(nn.Module):
    """A norm that ``change`` alters; without it an RMS norm."""

    def __init__(self, change: Any = lambda x, normed, weight: normed * weight) -> None:
        super().__init__()
        self.weight, self.eps, self.change = nn.Parameter(torch.ones(32)), 1e-6, change

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        out: Tensor = self.change(wide, normed, self.weight).to(x.dtype)
        return out


STRANGE = {
    "subtracts the mean": lambda x, normed, weight: (normed - normed.mean(-1, keepdim=True)) * weight,
    "two plus weight": lambda x, normed, weight: normed * (2 + weight),
    "a bounded weight": lambda x, normed, weight: normed * weight.clamp(max=0.5),
    "another eps": lambda x, normed, weight: (
        x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5) * weight
    ),
    "a sum of squares": lambda x, normed, weight: torch.nn.functional.normalize(x, dim=-1) * weight,
    "bounded": lambda x, normed, weight: (normed * weight).clamp(-2, 2),
    "bounded by its eps": lambda x, normed, weight: (
        x * torch.rsqrt(x.square().mean(-1, keepdim=True).clamp(min=1e-12)) * weight
    ),
    "two values": lambda x, normed, weight: SimpleNamespace(to=lambda dtype: (normed, weight)),
}


@pytest.mark.parametrize("change", STRANGE.values(), ids=STRANGE)
def test_a_strange_norm_is_left_alone(change: Any) -> None:
    assert find_norm_form(AlteredNorm(), torch.float32) == NormForm("weight", 1e-6, "weight")
    model = nn.Sequential(AlteredNorm(change))
    if change is STRANGE["bounded by its eps"]:
        model[0].eps = 1e-12
    assert find_norm_form(model[0], torch.float32) is None
    assert fuse_operations(model, (), torch.float32) == FusedModules(0, 0, 0)
    assert "forward" not in vars(model[0])


@pytest.mark.parametrize("form", ["weight", "one plus weight", "no weight"])
@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_a_form_is_found_whatever_the_weights_are(form: str, weight: float) -> None:
    changes: dict[str, Any] = {
        "weight": lambda x, normed, weight: normed * weight,
        "one plus weight": lambda x, normed, weight: normed * (1 + weight),
        "no weight": lambda x, normed, weight: normed,
    }
    module = AlteredNorm(changes[form])
    nn.init.constant_(module.weight, weight)
    found = find_norm_form(module, torch.float32)
    assert found is not None and found.form == form


def test_norms_of_another_dtype_are_left_alone() -> None:
    assert find_norm_form(AlteredNorm(), torch.bfloat16) is None
    wide = AlteredNorm(lambda x, normed, weight: SimpleNamespace(to=lambda dtype: normed * weight.float()))
    assert find_norm_form(wide.bfloat16(), torch.bfloat16) is None  # it gives float32


def test_calls_of_another_kind_go_to_the_module(fresh_seed: int) -> None:
    class Gated(AlteredNorm):
        def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
            out = super().forward(x)
            return out if gate is None else out * gate

    model = nn.Sequential(Gated())
    x = torch.randn(4, 32, generator=torch.Generator().manual_seed(fresh_seed))
    expected = model[0](x, x), model[0](x.double()), model[0](x)
    assert fuse_operations(model, (), torch.float32).norms == 1
    got = model[0](x, gate=x), model[0](x.double()), model[0](x)
    assert torch.equal(got[0], expected[0]) and torch.equal(got[1], expected[1])
    torch.testing.assert_close(got[2], expected[2])


def test_training_and_values_that_are_no_tensors_go_to_the_module() -> None:
    class Dropping(AlteredNorm):
        def forward(self, x: Tensor | None) -> Tensor:
            out = super().forward(torch.ones(4, 32) if x is None else x)
            return nn.functional.dropout(out, 0.5, self.training)

    model = nn.Sequential(Dropping()).eval()
    assert fuse_operations(model, (), torch.float32).norms == 1
    assert torch.equal(model[0](None), model[0](torch.ones(4, 32)))
    assert (model.train()[0](torch.ones(40, 32)) == 0).any()


def test_one_factor_of_rows_of_any_width_is_left_alone() -> None:
    norm = AlteredNorm()
    norm.weight = nn.Parameter(torch.ones(1))
    assert find_norm_form(norm, torch.float32) is None
