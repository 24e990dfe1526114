"""RMS norms of a model in one launch each, by torch's own operator where a module agrees with it.

transformers writes a norm as seven or eight operations, and on a GPU each is a launch. What a module computes
is found out by calling a copy of it. W numbers of a row.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import rms_norm

Form = Literal["weight", "one plus weight", "no weight"]
SCALES = (1.0, 1e-3, 30.0)
"""Sizes of the numbers that a module is tried with; eps shows in the small ones."""
TOLERANCE = 1e-5
"""Relative error in float32 up to which a module agrees."""
WIDTH = 48
"""W where no weight of the module says it."""
LARGEST_EPS = 1e-2


@dataclass(frozen=True)
class NormForm:
    """What a norm computes: x / sqrt(mean(x^2) + ``eps``), times what ``form`` names.

    Attributes:
        form: The factor.
        eps: Is added to the mean of the squares.
        weight: The name of the module's weight [W], if it has one.
    """

    form: Form
    eps: float
    weight: str | None

    def compute(self, x: Tensor, weight: Tensor | None) -> Tensor:
        """Compute the norm of ``x`` [..., W] with ``weight`` [W]; in float32, rounded at the end."""
        width = (x.shape[-1],)
        if self.form == "weight":
            return rms_norm(x, width, weight, self.eps)
        normed = rms_norm(x, width, None, self.eps)
        # One launch, whose factor is never rounded as a weight of its own would be.
        return normed if self.form == "no weight" or weight is None else torch.addcmul(normed, normed, weight)


class FusedNorm:
    """The forward of ``module`` as ``form`` says; calls of another kind go to the module's own.

    So do all calls in training, where modules may drop numbers.
    """

    def __init__(self, module: nn.Module, form: NormForm, dtype: torch.dtype) -> None:
        self._module, self._form, self._dtype = module, form, dtype
        self._own: Callable[..., Any] = module.forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Compute what the module's own forward computes."""
        if (
            len(args) != 1
            or kwargs
            or getattr(args[0], "dtype", None) != self._dtype
            or self._module.training
        ):
            return self._own(*args, **kwargs)
        name = self._form.weight
        return self._form.compute(args[0], None if name is None else getattr(self._module, name))


def fuse_norms(model: nn.Module, dtype: torch.dtype) -> int:
    """Let the RMS norms of ``model`` that compute in ``dtype`` take one launch; return how many there are."""
    count = 0
    for module in list(model.modules()):
        form = find_norm_form(module, dtype)
        if form is not None:
            module.forward = FusedNorm(module, form, dtype)
            count += 1
    return count


def find_norm_form(module: nn.Module, dtype: torch.dtype) -> NormForm | None:
    """Return what RMS norm ``module`` computes of rows in ``dtype``, or None if it computes none."""
    parameters = dict(module.named_parameters(recurse=False))
    numbers = {v for v in vars(module).values() if isinstance(v, float) and 0 < v < LARGEST_EPS}
    others = [*module.children(), *module.buffers(recurse=False)]
    if not numbers or others or len(parameters) > 1 or "forward" in vars(module):
        return None
    name, weight = next(iter(parameters.items()), (None, None))
    if weight is not None and (weight.ndim != 1 or weight.is_meta or weight.dtype != dtype):
        return None
    if weight is not None and len(weight) < 2:  # a factor of all numbers, however many there are
        return None
    forms: tuple[Form, ...] = ("weight", "one plus weight", "no weight") if name else ("no weight",)
    candidates = [NormForm(form, eps, name) for eps in sorted(numbers) for form in forms]
    draw = torch.Generator().manual_seed(0)
    trial = _copy_with_random_weight(module, name, draw)
    width = WIDTH if weight is None else weight.shape[0]
    # Numbers as small as its eps show whether a module adds it, or bounds the mean by it.
    rows = {
        c: [s * torch.randn(1, 2, 3, width, generator=draw) for s in (*SCALES, c.eps**0.5)]
        for c in candidates
    }
    return next((c for c in candidates if _agrees(trial, c, rows[c], dtype)), None)


def _copy_with_random_weight(module: nn.Module, name: str | None, draw: torch.Generator) -> nn.Module:
    """Copy ``module`` to the host in float32: weights of 1 or 0 would hide what is done with them."""
    trial = copy.copy(module)
    trial._parameters = dict(module._parameters)
    if name is not None:
        values = torch.randn(module._parameters[name].shape, generator=draw)  # type: ignore[union-attr]
        trial._parameters[name] = nn.Parameter(values, requires_grad=False)
    return trial


@torch.no_grad()
def _agrees(trial: nn.Module, form: NormForm, rows: list[Tensor], dtype: torch.dtype) -> bool:
    """Return whether ``trial`` computes ``form`` of all ``rows`` [1, 2, 3, W], and keeps their dtype."""
    weight = None if form.weight is None else getattr(trial, form.weight)
    try:
        for x in rows:
            for given in (x, x[0], x[0, 0]):
                own = trial.forward(given)
                expected = form.compute(given, weight)
                if not isinstance(own, Tensor) or own.shape != expected.shape or own.dtype != x.dtype:
                    return False
                if not (own - expected).norm() <= TOLERANCE * expected.norm():
                    return False
        if form.weight is not None:
            trial._parameters[form.weight] = nn.Parameter(getattr(trial, form.weight).to(dtype), False)
        out = trial.forward(rows[0].to(dtype))
    except Exception:  # noqa: BLE001 - any module may be tried; one that wants more arguments is no norm
        return False
    return bool(out.dtype == dtype)
