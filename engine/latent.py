"""Experts of another width than the model's: tokens enter and leave their latent space by two products.

T tokens, H hidden size, L latent size. The gate and the shared experts work on H.
"""

from torch import Tensor

from xpar.comm.reduction import Transform
from xpar.engine.routers.gate import gate_logits


class LatentSpace:
    """``enter`` [L, H] and ``leave`` [H, L] are weights of the model's dtype.

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
