"""Experts of another width than the model's: what is refused, and that weights meet the tokens on the right
side."""

from dataclasses import replace

import pytest
import torch

from xpar.comm import ProcessGrid
from xpar.engine.config import LayerConfig, RouterConfig, SharedConfig
from xpar.engine.layer.build import build_layer
from xpar.engine.layer.latent import LatentProjection
from xpar.engine.layer.options import LayerOptions
from xpar.engine.synthetic.layer import SyntheticLayer

LATENT = LayerConfig(6, 32, 24, RouterConfig(2), shared=SharedConfig(16, gated=True), latent_size=20)


@pytest.mark.parametrize("on_input", [False, True], ids=["output", "input"])
@pytest.mark.parametrize("exact", [False, True], ids=["fast", "exact"])
def test_equals_the_reference(exact: bool, on_input: bool, fresh_seed: int) -> None:
    router = RouterConfig(1, weight_on_input=True, renormalize=False) if on_input else LATENT.router
    layer = SyntheticLayer(replace(LATENT, router=router), torch.float32, fresh_seed)
    runner = build_layer(
        layer.config, ProcessGrid.single(), torch.float32, layer.read, LayerOptions(exact=exact)
    )
    x = torch.randn(9, 32, generator=torch.Generator().manual_seed(fresh_seed))
    torch.testing.assert_close(runner(x), layer.reference(x)[0], rtol=1e-4, atol=1e-5)


def test_exact_mode_gives_a_token_the_same_bits_among_others(fresh_seed: int) -> None:
    layer = SyntheticLayer(LATENT, torch.float32, fresh_seed)
    runner = build_layer(LATENT, ProcessGrid.single(), torch.float32, layer.read, LayerOptions(exact=True))
    x = torch.randn(9, 32, generator=torch.Generator().manual_seed(fresh_seed))
    assert torch.equal(runner(x)[3:5], runner(x[3:5]))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"latent_size": 0}, "latent_size=0: must be at least 1"),
        ({"output_bias": True}, "latent_size=20 with an output bias or zero experts"),
        ({"router": RouterConfig(2, zero_experts=1)}, "latent_size=20 with an output bias or zero experts"),
    ],
    ids=["nothing", "output bias", "zero experts"],
)
def test_a_layer_that_cannot_be(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(LATENT, **changes)  # type: ignore[arg-type]


def test_weights_that_do_not_lead_back() -> None:
    with pytest.raises(ValueError, match=r"\[20, 32\] and \[20, 32\]: must be \[L, H\] and \[H, L\]"):
        LatentProjection(torch.zeros(20, 32), torch.zeros(20, 32))
