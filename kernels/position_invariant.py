"""Functions of single elements whose result for a value does not depend on the value's place in the tensor.

torch's elementwise CPU kernels run whole vectors and finish each thread's share with scalar code that rounds
otherwise; a GPU does not. Pieces that are small enough for one thread and a whole number of vectors have no such rest.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

# Elements: a multiple of every vector step, and what torch gives to one thread at least.
VECTOR = 64
ELEMENTS_PER_CALL = 32768


def position_invariant(function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """``function(*tensors)`` for an elementwise ``function`` of tensors of one shape and dtype; a new tensor."""
    if tensors[0].is_cuda:  # one thread an element: nothing is left over
        return function(*tensors)
    shape, count = tensors[0].shape, tensors[0].numel()
    flat = [functional.pad(t.reshape(-1), (0, -count % VECTOR)) for t in tensors]
    out = torch.empty_like(flat[0])
    for begin in range(0, out.numel(), ELEMENTS_PER_CALL):
        out[begin : begin + ELEMENTS_PER_CALL] = function(
            *(f[begin : begin + ELEMENTS_PER_CALL] for f in flat)
        )
    return out[:count].view(shape)
