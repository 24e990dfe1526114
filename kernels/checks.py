"""What every expert kernel asks of the weights it is given."""

from typing import TypeVar

from torch import Tensor

from xpar.kernels.contracts import ExpertSpec

_T = TypeVar("_T")


def check_expert(spec: ExpertSpec, index: int, gate_up: Tensor, down: Tensor) -> None:
    """Raise ValueError unless ``index`` and the shapes are those of ``spec``."""
    if not 0 <= index < spec.num_experts:
        raise ValueError(f"expert {index}: this rank holds experts 0 to {spec.num_experts - 1}")
    expected = {
        "gate_up": (2 * spec.intermediate_size, spec.hidden_size),
        "down": (spec.hidden_size, spec.intermediate_size),
    }
    for name, tensor in (("gate_up", gate_up), ("down", down)):
        if tuple(tensor.shape) != expected[name]:
            raise ValueError(f"expert {index}: {name} is {tuple(tensor.shape)}, expected {expected[name]}")


def check_loaded(weights: _T | None, index: int) -> _T:
    """The weights of expert ``index``, or RuntimeError if nobody loaded them."""
    if weights is None:
        raise RuntimeError(f"expert {index} has tokens but no weights: call load_expert({index}, ...) first")
    return weights
