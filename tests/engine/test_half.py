"""float16: a layer whose output overflows is exact at its smaller scale, and a decoder that keeps both halves agrees."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from xpar.comm import RemoteRankError
from xpar.engine.bench.peer_process import solo_grid
from xpar.engine.build import assemble
from xpar.engine.config import LayerConfig, RouterConfig, SharedConfig
from xpar.engine.half import HalfScale, rms_norm, scaled_down
from xpar.engine.random_layer import RandomLayer

HIDDEN, FACTOR, EPS = 32, 64.0, 1e-6
CONFIG = LayerConfig(
    6, HIDDEN, 24, RouterConfig(2, routed_scaling_factor=FACTOR), shared=SharedConfig(16, scale=0.5)
)
PLAIN = {
    "plain": CONFIG,
    "gated": replace(CONFIG, shared=SharedConfig(16, gated=True)),
    "no shared": replace(CONFIG, shared=None),
    "identity experts": replace(CONFIG, router=replace(CONFIG.router, zero_experts=2, top_k=4)),
    "latent": replace(CONFIG, latent_size=20),
}


def tokens(seed: int, size: float) -> Tensor:
    return (torch.randn(7, HIDDEN, generator=torch.Generator().manual_seed(seed)) * size).half()


@pytest.mark.parametrize("config", PLAIN.values(), ids=PLAIN.keys())
def test_an_output_beyond_float16_is_right_at_its_smaller_scale(config: LayerConfig, fresh_seed: int) -> None:
    layer = RandomLayer(config, torch.float16, fresh_seed)
    x = tokens(fresh_seed, 60.0)
    reference, _ = layer.reference(x)
    assert reference.abs().max() > 65504  # this layer overflows
    runner = assemble(config, solo_grid(1), torch.float16, layer.read)
    assert not torch.isfinite(runner(x)).all()
    small, scale = scaled_down(config)
    output = assemble(small, solo_grid(1), torch.float16, layer.read)(x)
    assert torch.isfinite(output).all() and scale.factor == FACTOR
    error = (output.double() * FACTOR - reference.double()).norm() / reference.double().norm()
    assert error < 5e-3


def decoder(layer: object, x: Tensor, weight: Tensor, scale: HalfScale) -> Tensor:
    """Two rounds of a dense block and expert layers, each on a norm of the residual; returns the last norm."""
    assert callable(layer)
    residual = scale.residual(x)
    eps = scale.epsilon(EPS)
    for _ in range(2):
        residual = residual + scale.residual(torch.tanh(rms_norm(residual, weight, eps)))
        residual = residual + layer(rms_norm(residual, weight, eps))
    return rms_norm(residual, weight, eps)


def test_a_decoder_that_keeps_both_halves_agrees_with_one_in_float64(fresh_seed: int) -> None:
    config = replace(
        CONFIG, router=replace(CONFIG.router, top_k=6)
    )  # all experts: no choice hangs on a rounding
    layer = RandomLayer(config, torch.float16, fresh_seed)
    small, scale = scaled_down(config)
    runner = assemble(small, solo_grid(1), torch.float16, layer.read)
    x, weight = tokens(fresh_seed, 1.0), torch.full((HIDDEN,), 40.0, dtype=torch.float16)
    expected = decoder(lambda h: layer.reference(h)[0], x.float(), weight.float(), HalfScale(1.0))
    got = decoder(runner, x, weight, scale)
    full = assemble(config, solo_grid(1), torch.float16, layer.read)
    with pytest.raises(RemoteRankError, match=r"router logits of token . are not finite"):
        decoder(
            full, x, weight, HalfScale(1.0)
        )  # the first layer overflows, the second refuses what came of it
    # A router that weighs two experts alike makes much of a rounding: as much as of those of its inputs alone.
    rounded = decoder(lambda h: layer.reference(h.half())[0], x.float(), weight.float(), HalfScale(1.0))
    allowed = 5e-3 + 12 * (rounded.double() - expected.double()).norm() / expected.double().norm()
    assert (got.double() - expected.double()).norm() / expected.double().norm() < allowed
    one_half = decoder(runner, x, weight, HalfScale(1.0))  # a decoder that forgets its half
    assert not torch.allclose(one_half.float(), expected, rtol=2e-2, atol=1e-2)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (replace(CONFIG, output_bias=True), "float16 scaling with an output bias"),
        (
            replace(CONFIG, router=RouterConfig(1, weight_on_input=True)),
            "float16 scaling with weights on the input",
        ),
        (
            replace(CONFIG, router=RouterConfig(2, routed_scaling_factor=0.0)),
            "routed_scaling_factor=0.0: must be positive",
        ),
    ],
    ids=["output bias", "on input", "zero"],
)
def test_a_layer_whose_factor_is_not_one_of_the_output(config: LayerConfig, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        scaled_down(config)
