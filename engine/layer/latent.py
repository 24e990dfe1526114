"""Experts that do not read the layer's own tokens: what makes of them what those read, and perhaps back again.

T tokens, H hidden size, L latent size. The gate and the shared experts work on H.
"""

from typing import Protocol

from torch import Tensor

from xpar.comm.reduction import Transform
from xpar.engine.routing.gate import gate_logits, rms_norm


class ExpertInputProjection(Protocol):
    """Where the routed experts compute."""

    def enter(self, hidden_states: Tensor) -> Tensor:
        """[T, H] -> [T, L]: what the routed experts see."""

    @property
    def leave(self) -> Transform | None:
        """[T, L] -> [T, H]; None where the experts' outputs are the layer's."""


class NormProjection:
    """Tokens over their root mean square, times ``scale`` [H]; summed in float32 and rounded once (Gemma-4)."""

    leave = None

    def __init__(self, scale: Tensor, epsilon: float) -> None:
        self._scale, self._epsilon = scale.float(), epsilon

    def enter(self, hidden_states: Tensor) -> Tensor:
        """[T, H] -> [T, H]."""
        return (rms_norm(hidden_states, self._epsilon) * self._scale).to(hidden_states.dtype)


class LatentProjection:
    """A space of another width, which tokens enter and leave by two products.

    ``enter`` [L, H] and ``leave`` [H, L] are weights of the model's dtype.

    ``row_invariant``: a token's bits do not depend on which other tokens are in the batch.
    """

    def __init__(self, enter: Tensor, leave: Tensor, row_invariant: bool = False) -> None:
        if enter.shape != (leave.shape[1], leave.shape[0]):
            raise ValueError(
                f"latent weights {list(enter.shape)} and {list(leave.shape)}: must be [L, H] and [H, L]"
            )
        self._enter, self._leave, self._row_invariant = enter, leave, row_invariant

    def enter(self, hidden_states: Tensor) -> Tensor:
        """[T, H] -> [T, L]: what the routed experts see."""
        return gate_logits(hidden_states, self._enter, self._row_invariant)

    @property
    def leave(self) -> Transform:
        """[T, L] -> [T, H]; without a bias, so that ranks may apply it to their addends."""
        return Transform(
            lambda routed: gate_logits(routed, self._leave, self._row_invariant), reduce_commutes=True
        )
