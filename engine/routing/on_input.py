"""Router weights that multiply a token before its expert (Llama-4) instead of the output after it."""

from dataclasses import replace

import torch
from torch import Tensor

from xpar.kernels.contracts import Routing


def weigh_input(hidden_states: Tensor, routing: Routing) -> tuple[Tensor, Routing]:
    """What to dispatch, and with what routing: for ``weight_on_input`` the scaled tokens and weights of one.

    ``hidden_states`` [T, H] is not changed: the product is float32, rounded once to its dtype. Any other routing comes
    back as it is, with the tokens themselves.
    """
    if not routing.weight_on_input:
        return hidden_states, routing
    scaled = (hidden_states.float() * routing.topk_weights).to(hidden_states.dtype)
    ones = torch.ones_like(routing.topk_weights)
    return scaled, replace(routing, topk_weights=ones, weight_on_input=False)
