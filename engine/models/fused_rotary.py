"""Rotary embedding of queries and keys in one launch, in each attention module of one model alone.

transformers' attention calls a function of its own file by name, ten operations long. A module gets a forward
with the same code that finds another function by that name; nothing of transformers changes. B sequences, S
columns, Hq query heads, Hk key heads, D numbers of a head, R of which are rotated.
"""

import inspect
from collections.abc import Callable, Mapping
from types import CellType, FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn

NAME = "apply_rotary_pos_emb"
"""The function's name in transformers, of many families that have functions of their own."""
PARAMETERS = ("q", "k", "cos", "sin", "unsqueeze_dim")
Rotate = Callable[[Tensor, Tensor, Tensor, Tensor, bool], tuple[Tensor, Tensor]]
"""(q, k, cos, sin, whether both halves share factors) -> rotated q and k, [B, H, S, D] each."""
TOLERANCE = 1e-6


def rotate_by_definition(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, shares_factors: bool
) -> tuple[Tensor, Tensor]:
    """Rotate the first numbers of each head, half against half; each product is rounded.

    Args:
        q: [B, Hq, S, D].
        k: [B, Hk, S, D].
        cos: [B or 1, S, R], or [B or 1, S, R / 2] with ``shares_factors``.
        sin: As ``cos``.
        shares_factors: True if both halves of a head have the same factors.
    """
    if shares_factors:
        cos, sin = (torch.cat([x, x], dim=-1) for x in (cos, sin))
    cos, sin = cos[:, None], sin[:, None]
    width, half = cos.shape[-1], cos.shape[-1] // 2

    def rotated(x: Tensor) -> Tensor:
        a, b, rest = x[..., :half], x[..., half:width], x[..., width:]
        first = a * cos[..., :half] - b * sin[..., :half]
        second = b * cos[..., half:] + a * sin[..., half:]
        return torch.cat([first, second, rest], dim=-1)

    return rotated(q), rotated(k)


class FusedRotary:
    """The function of a model's file with ``rotate`` for the calls that it serves.

    Attributes:
        own: transformers' function, which computes all other calls.
        forms: (whether both halves share factors, whether some numbers are not rotated) of the calls in which
            ``own`` agrees with the definition.
    """

    def __init__(self, own: Callable[..., Any], forms: frozenset[tuple[bool, bool]], rotate: Rotate) -> None:
        self.own, self.forms, self._rotate = own, forms, rotate

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Rotate q and k; the arguments are those of ``own``."""
        given = {**dict(zip(PARAMETERS, args, strict=False)), **kwargs}
        heads = given.get("unsqueeze_dim", 1)
        tensors: list[Any] = [given.get(name) for name in PARAMETERS[:4]]
        shares = None
        if len(args) <= len(PARAMETERS) and given.keys() <= set(PARAMETERS):
            shares = self._shares(tensors, heads)
        if shares is None:
            return self.own(*args, **kwargs)
        q, k, cos, sin = tensors
        if heads == 1:
            return self._rotate(q, k, cos, sin, shares)
        q, k = self._rotate(q.transpose(1, 2), k.transpose(1, 2), cos, sin, shares)
        return q.transpose(1, 2), k.transpose(1, 2)

    def _shares(self, tensors: list[Any], heads: int) -> bool | None:
        """Return whether both halves share factors; None for a call that is not served."""
        if heads not in (1, 2) or not all(isinstance(x, Tensor) for x in tensors):
            return None
        q, k, cos, sin = tensors
        if q.ndim != 4 or k.ndim != 4 or cos.ndim != 3 or cos.shape != sin.shape:
            return None
        batch, columns, width = q.shape[0], q.shape[3 - heads], q.shape[3]
        dense = q.stride(3) == k.stride(3) == 1 and k.shape[3] == width
        if not dense or k.shape[0] != batch or k.shape[3 - heads] != columns:
            return None
        if {k.dtype, cos.dtype, sin.dtype} != {q.dtype} or cos.shape[:2] not in (
            (batch, columns),
            (1, columns),
        ):
            return None
        factors = cos.shape[2]
        for shares in (False, True):
            rotated = factors * (2 if shares else 1)
            # One form alone: nobody can tell half a head with factors of its own from a whole one without.
            if rotated and rotated % 2 == 0 and rotated <= width and (shares, rotated < width) in self.forms:
                return shares
        return None


def fuse_rotary(model: nn.Module, rotate: Rotate) -> int:
    """Let the attention modules of ``model`` rotate by ``rotate``; return how many do."""
    made: dict[Any, Any] = {}
    count = 0
    for module in model.modules():
        forward = type(module).forward
        if "forward" in vars(module) or NAME not in _code_of(forward).co_names:
            continue
        if forward not in made:
            made[forward] = _with_rotary(forward, rotate)
        if made[forward] is not None:
            module.forward = MethodType(made[forward], module)
            count += 1
    return count


def _code_of(function: Any) -> Any:
    return getattr(inspect.unwrap(function), "__code__", (lambda: None).__code__)


def _with_rotary(forward: Any, rotate: Rotate) -> Any:
    """Return ``forward`` with a fused function by the name; None if the function is of another kind."""
    own = inspect.unwrap(forward).__globals__.get(NAME)
    forms = find_rotary_forms(own)
    return with_globals(forward, {NAME: FusedRotary(own, forms, rotate)}) if forms else None


@torch.no_grad()
def find_rotary_forms(own: Any) -> frozenset[tuple[bool, bool]]:
    """Find the forms in which ``own`` agrees with the definition; see :class:`FusedRotary`.

    Where a call could be of two forms the function has neither.
    """
    try:
        if tuple(inspect.signature(own).parameters)[: len(PARAMETERS)] != PARAMETERS:
            return frozenset()
    except (TypeError, ValueError):
        return frozenset()
    draw = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 3, 5, 16, generator=draw), torch.randn(2, 2, 5, 16, generator=draw)
    found = set()
    for shares, is_partial in ((False, False), (False, True), (True, False), (True, True)):
        factors = (8 if is_partial else 16) // (2 if shares else 1)
        cos, sin = torch.randn(2, 2, 5, factors, generator=draw)
        if _equal(own, q, k, cos, sin, shares):
            found.add((shares, is_partial))
    ambiguous = (False, True) in found and found & {(True, False), (True, True)}
    return frozenset() if ambiguous else frozenset(found)


def _equal(own: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, shares: bool) -> bool:
    expected = rotate_by_definition(q, k, cos, sin, shares)
    try:
        got = own(q, k, cos, sin)
        pairs = list(zip(got, expected, strict=True))
        short = own(*(x.bfloat16() for x in (q, k, cos, sin)))
        if any(x.dtype != torch.bfloat16 for x in short):
            return False  # it makes queries wider, as no kernel does
        return all(a.shape == b.shape and bool((a - b).norm() <= TOLERANCE * b.norm()) for a, b in pairs)
    except Exception:  # noqa: BLE001 - shapes that the function does not take
        return False


def with_globals(function: Any, names: Mapping[str, Any]) -> Any:
    """Copy ``function``, which finds ``names`` among its globals, under the decorators that it has.

    Returns None if a decorator keeps the function where it cannot be replaced.
    """
    wrapped = getattr(function, "__wrapped__", None)
    if wrapped is None:
        copied = FunctionType(
            function.__code__,
            {**function.__globals__, **names},
            function.__name__,
            function.__defaults__,
            function.__closure__,
        )
        copied.__kwdefaults__ = function.__kwdefaults__
        return copied
    inner = with_globals(wrapped, names)
    cells = getattr(function, "__closure__", None) or ()
    if inner is None or not any(cell.cell_contents is wrapped for cell in cells):
        return None
    closure = tuple(CellType(inner) if cell.cell_contents is wrapped else cell for cell in cells)
    outer = FunctionType(
        function.__code__, function.__globals__, function.__name__, function.__defaults__, closure
    )
    outer.__kwdefaults__ = function.__kwdefaults__
    outer.__dict__ |= {**function.__dict__, "__wrapped__": inner}
    return outer
