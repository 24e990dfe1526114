"""What a layer's output holds besides its experts' outputs: identity experts and an output bias."""

import torch
from torch import Tensor

from xpar.comm.reduction import Distributed, Partial
from xpar.engine.routing import identity_output
from xpar.kernels.contracts import Routing


def add_identity_and_bias(
    routed: Distributed, hidden_states: Tensor, routing: Routing, output_bias: Tensor | None
) -> Distributed:
    """``routed`` and what its tokens get beside it, in the same state, added in float32 and rounded once.

    ``hidden_states`` [T, H] and ``routing`` are of the tokens of ``routed``, ``output_bias`` is [H]. Where the ranks of
    a group hold addends, the first of them adds these: they count once.
    """
    identity = identity_output(hidden_states, routing)
    if identity is None and output_bias is None:
        return routed
    if isinstance(routed.state, Partial) and routed.state.group.rank != 0:
        return routed
    total = routed.tensor.to(torch.float32)
    if identity is not None:
        total = total + identity
    if output_bias is not None:
        total = total + output_bias.float()
    return Distributed(total.to(routed.tensor.dtype), routed.state)
