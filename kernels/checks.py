"""What every expert kernel asks of the weights it is given."""

from typing import TypeVar

from torch import Tensor

from xpar.kernels.contracts import ExpertSpec

_T = TypeVar("_T")


def check_expert(
    spec: ExpertSpec,
    index: int,
    gate_up: Tensor,
    down: Tensor,
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
) -> None:
    """Raise ValueError unless ``index`` and the shapes are those of ``spec``."""
    if not 0 <= index < spec.num_experts:
        raise ValueError(f"expert {index}: this rank holds experts 0 to {spec.num_experts - 1}")
    packed = spec.activation.packed(spec.intermediate_size)
    expected: dict[str, tuple[Tensor | None, tuple[int, ...] | None]] = {
        "gate_up": (gate_up, (packed, spec.hidden_size)),
        "down": (down, (spec.hidden_size, spec.intermediate_size)),
        "gate_up_bias": (gate_up_bias, (packed,) if spec.bias else None),
        "down_bias": (down_bias, (spec.hidden_size,) if spec.bias else None),
    }
    for name, (tensor, shape) in expected.items():
        found = None if tensor is None else tuple(tensor.shape)
        if found != shape:
            raise ValueError(f"expert {index}: {name} is {found}, expected {shape}")


def check_loaded(weights: _T | None, index: int) -> _T:
    """The weights of expert ``index``, or RuntimeError if nobody loaded them."""
    if weights is None:
        raise RuntimeError(f"expert {index} has tokens but no weights: call load_expert({index}, ...) first")
    return weights
