"""float16: a layer whose output overflows is exact at its smaller scale, and a decoder that keeps both halves
agrees."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from xpar.comm import ProcessGrid, RemoteRankError
from xpar.engine.config import LayerConfig, RouterConfig, SharedConfig
from xpar.engine.layer.build import build_layer
from xpar.engine.layer.residual_scaling import ResidualScale, rms_norm, scale_layer_output
from xpar.engine.synthetic.layer import SyntheticLayer

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
    layer = SyntheticLayer(config, torch.float16, fresh_seed)
    x = tokens(fresh_seed, 60.0)
    reference, _ = layer.reference(x)
    assert reference.abs().max() > 65504  # this layer overflows
    runner = build_layer(config, ProcessGrid.single(), torch.float16, layer.read)
    assert not torch.isfinite(runner(x)).all()
    small, scale = scale_layer_output(config)
    output = build_layer(small, ProcessGrid.single(), torch.float16, layer.read)(x)
    assert torch.isfinite(output).all() and scale.factor == FACTOR
    error = (output.double() * FACTOR - reference.double()).norm() / reference.double().norm()
    assert error < 5e-3


def relative_error(got: Tensor, expected: Tensor) -> float:
    return float((got.double() - expected.double()).norm() / expected.double().norm())


def worst_step(
    layer: Callable[[Tensor], Tensor], exact: SyntheticLayer, x: Tensor, scale: ResidualScale
) -> float:
    """The largest error of a step of a decoder in halves: two rounds of a dense block and expert layers, each
    on a norm.

    Every step is compared with the same step in float64 from the halves that it was given: a router makes
    much of what its input differs by, so whole runs differ by more than their steps' roundings.
    """
    weight = torch.full((HIDDEN,), 40.0, dtype=torch.float16)
    residual, errors = scale.residual(x), [relative_error(scale.residual(x) * scale.factor, x)]

    def norm() -> Tensor:
        normed = rms_norm(residual, weight, scale.epsilon(EPS))
        errors.append(
            relative_error(normed, rms_norm(residual.double() * scale.factor, weight.double(), EPS))
        )
        return normed

    def add(change: Tensor, expected: Tensor) -> Tensor:
        total = residual + change
        errors.append(
            relative_error(total.double() * scale.factor, residual.double() * scale.factor + expected)
        )
        return total

    for _ in range(2):
        dense = torch.tanh(norm())
        residual = add(scale.residual(dense), dense.double())
        normed = norm()
        residual = add(layer(normed), exact.reference(normed)[0].double())
    norm()
    return max(errors)


def test_each_step_of_a_decoder_that_keeps_both_halves_agrees_with_float64(fresh_seed: int) -> None:
    config = replace(
        CONFIG, router=replace(CONFIG.router, top_k=6)
    )  # all experts: no choice hangs on a rounding
    layer = SyntheticLayer(config, torch.float16, fresh_seed)
    small, scale = scale_layer_output(config)
    runner = build_layer(small, ProcessGrid.single(), torch.float16, layer.read)
    x = tokens(fresh_seed, 1.0)
    assert worst_step(runner, layer, x, scale) < 5e-3
    assert worst_step(runner, layer, x, ResidualScale(1.0)) > 2e-2  # a decoder that forgets its half
    full = build_layer(config, ProcessGrid.single(), torch.float16, layer.read)
    with pytest.raises(RemoteRankError, match=r"router logits of token . are not finite"):
        worst_step(
            full, layer, x, ResidualScale(1.0)
        )  # the first overflows, the second refuses what came of it


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
        scale_layer_output(config)
