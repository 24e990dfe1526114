"""float16 models whose experts' sum exceeds 65504.

The layer's output stays a factor smaller, and so does the residual.

The routed scaling factor f is left out of the router's weights and the shared experts are divided by it, so
that the layer returns its output over f. A decoder that adds everything else to its residual over f as well
keeps one common factor, and a norm takes it out again: RMSNorm(x / f) = RMSNorm(x), but for its epsilon,
which f**-2 scales.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from xpar.engine.config import LayerConfig


@dataclass(frozen=True)
class ResidualScale:
    """The decoder's half of the contract: its residual is what it would be, over ``factor``."""

    factor: float

    def residual(self, hidden_states: Tensor) -> Tensor:
        """What enters the first layer, and what any block but an expert layer adds.

        [T, H] over the factor.
        """
        return (hidden_states.float() / self.factor).to(hidden_states.dtype)

    def epsilon(self, eps: float) -> float:
        """The epsilon with which a norm of the scaled residual gives what ``eps`` gives of the full one."""
        return eps / self.factor**2


def scale_layer_output(config: LayerConfig) -> tuple[LayerConfig, ResidualScale]:
    """The layer's half.

    A layer that returns its output over the routed scaling factor, and what the decoder owes.

    Both halves or neither: a decoder that ignores the scale adds a wrong sum. Raises ValueError for a layer
    in which the factor is not one of the output: with weights on the input or an output bias.
    """
    factor = config.router.routed_scaling_factor
    if config.router.weight_on_input or config.output_bias:
        what = "an output bias" if config.output_bias else "weights on the input"
        raise ValueError(f"float16 scaling with {what}: it is not a factor of the output; use bfloat16")
    if not factor > 0:
        raise ValueError(f"routed_scaling_factor={factor}: must be positive to be divided by; use bfloat16")
    shared = None if config.shared is None else replace(config.shared, scale=config.shared.scale / factor)
    router = replace(config.router, routed_scaling_factor=1.0)
    return replace(config, router=router, shared=shared), ResidualScale(factor)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """[T, H], summed in float32: squares of float16 values overflow long before the values do."""
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype) * weight
