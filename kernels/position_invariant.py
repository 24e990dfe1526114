"""Elementwise functions whose result for a value does not depend on its position.

torch's elementwise CPU kernels compute whole vectors and finish each thread's part with scalar code, which
rounds differently; a GPU does not. Pieces that one thread computes and that are a whole number of vectors
have no such rest.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

VECTOR = 64  # elements: a multiple of the step of every vector instruction set
ELEMENTS_PER_CALL = 32768  # torch gives at least so many elements to one thread


def position_invariant(function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """Return an elementwise ``function(*tensors)`` whose bits do not depend on the position."""
    if tensors[0].is_cuda:  # a GPU has one thread per element and no rest
        return function(*tensors)
    shape, count = tensors[0].shape, tensors[0].numel()
    flat = [functional.pad(t.reshape(-1), (0, -count % VECTOR)) for t in tensors]
    out = torch.empty_like(flat[0])
    for begin in range(0, out.numel(), ELEMENTS_PER_CALL):
        out[begin : begin + ELEMENTS_PER_CALL] = function(
            *(f[begin : begin + ELEMENTS_PER_CALL] for f in flat)
        )
    return out[:count].view(shape)
