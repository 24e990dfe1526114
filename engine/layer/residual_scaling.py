"""Scaling of float16 models whose expert layers' outputs exceed 65504, the largest float16 number.

The layer leaves the routed scaling factor f out of its router's weights and divides its shared experts by f,
so that it returns its output over f. The decoder adds everything else to its residual over f as well. A norm
takes the common factor out again: RMSNorm(x / f) = RMSNorm(x), up to its epsilon, which is multiplied by
f**-2.
"""

from dataclasses import dataclass, replace

from torch import Tensor

from xpar.engine.config import LayerConfig
from xpar.engine.routing import gate


@dataclass(frozen=True)
class ResidualScale:
    """The changes that a decoder needs when the outputs of its expert layers are divided by ``factor``."""

    factor: float

    def residual(self, hidden_states: Tensor) -> Tensor:
        """Divide what enters the first layer, or what a block without experts adds, [T, H], by the factor."""
        return (hidden_states.float() / self.factor).to(hidden_states.dtype)

    def epsilon(self, eps: float) -> float:
        """Return the epsilon with which a norm of the scaled residual equals ``eps`` on the full one."""
        return eps / self.factor**2


def scale_layer_output(config: LayerConfig) -> tuple[LayerConfig, ResidualScale]:
    """Configure a layer that returns its output over the routed scaling factor.

    The second value says what its decoder must do. Layer and decoder must both be scaled, or neither: a
    decoder that ignores the scale adds a wrong sum. Raises ValueError if the factor is none of the whole
    output: weights on the input, or an output bias.
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
    """Norm ``x`` [T, H], summed in float32: squares of float16 values overflow long before the values do."""
    return gate.rms_norm(x, eps).to(x.dtype) * weight
