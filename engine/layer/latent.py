"""Projections of the tokens to what the routed experts read, and of their outputs back to the hidden size.

L is the latent size. The router's gate and the shared experts always read the tokens themselves.
"""

from typing import Protocol

from torch import Tensor

from xpar.comm.reduction import Transform
from xpar.engine.routing.gate import gate_logits, rms_norm


class ExpertInputProjection(Protocol):
    """A map from tokens to the routed experts' input, and back from their output."""

    def down(self, hidden_states: Tensor) -> Tensor:
        """Map tokens ``[T, H]`` to the experts' input ``[T, L]``."""

    @property
    def up(self) -> Transform | None:
        """The map from the experts' output ``[T, L]`` to ``[T, H]``; None where no map is needed."""


class NormProjection:
    """Divides tokens by their root mean square, times ``scale`` [H]; float32, rounded once (Gemma-4)."""

    up = None

    def __init__(self, scale: Tensor, epsilon: float) -> None:
        self._scale, self._epsilon = scale.float(), epsilon

    def down(self, hidden_states: Tensor) -> Tensor:
        """Norm the tokens ``[T, H]``."""
        return (rms_norm(hidden_states, self._epsilon) * self._scale).to(hidden_states.dtype)


class LatentProjection:
    """A latent space that tokens enter by ``down`` [L, H] and leave by ``up`` [H, L], without biases.

    ``row_invariant``: a token's bits do not depend on the other tokens of the batch.
    """

    def __init__(self, down: Tensor, up: Tensor, row_invariant: bool = False) -> None:
        if down.shape != (up.shape[1], up.shape[0]):
            raise ValueError(
                f"latent weights {list(down.shape)} and {list(up.shape)}: must be [L, H] and [H, L]"
            )
        self._down, self._up, self._row_invariant = down, up, row_invariant

    def down(self, hidden_states: Tensor) -> Tensor:
        """Map tokens ``[T, H]`` to the latent space ``[T, L]``."""
        return gate_logits(hidden_states, self._down, self._row_invariant)

    @property
    def up(self) -> Transform:
        """The map from ``[T, L]`` to ``[T, H]``; it has no bias, so ranks may apply it to their addends."""
        return Transform(
            lambda routed: gate_logits(routed, self._up, self._row_invariant), reduce_commutes=True
        )
