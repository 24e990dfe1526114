"""Routers of a model by xpar's own rule, which on a GPU takes one launch after the gate's product.

transformers' softmax, top-k, sums and casts are a launch each, or several. What a router computes is found
out by calling a copy of it. T tokens, H hidden size, E experts, k of which are chosen.
"""

import copy
from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from xpar.engine.config import RouterConfig
from xpar.engine.routing.router import Router

ROWS = 512
"""T of the tokens that a router is tried with: two ways to score groups agree on many tokens."""
TOLERANCE = 1e-5
"""Relative error of weights and logits in float32 up to which a router agrees."""
GROUPS, KEPT, SCALE = ("n_group", "num_group"), ("topk_group",), ("routed_scaling_factor",)
"""The names under which routers keep numbers of a rule; a wrong guess agrees with no router."""


class FusedRouter:
    """The forward of ``module`` by ``router``; calls of another kind go to the module's own.

    So do all calls in training, where routers may add noise.
    """

    def __init__(self, module: nn.Module, router: Router, dtype: torch.dtype) -> None:
        self._module, self._router, self._dtype = module, router, dtype
        self._own = module.forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Compute logits [T, E], weights [T, k] in float32 and ids [T, k] in int32 of hidden states."""
        if (
            len(args) != 1
            or kwargs
            or getattr(args[0], "dtype", None) != self._dtype
            or self._module.training
        ):
            return self._own(*args, **kwargs)
        rows = args[0].reshape(-1, args[0].shape[-1])
        logits = self._router.logits(rows)
        routing = self._router.route(None, logits)
        return logits, routing.topk_weights, routing.topk_ids


def fuse_routers(blocks: Iterator[nn.Module], dtype: torch.dtype) -> int:
    """Let the routers in ``blocks`` route by xpar's rule; return how many do.

    ``blocks``: modules that give what a router of theirs returns to experts that xpar computes.
    """
    count = 0
    asked: dict[Any, RouterConfig | None] = {}
    for module in [module for block in blocks for module in block.modules()]:
        weight, bias = _tensors(module)
        if weight is None or "forward" in vars(module):
            continue
        kind = (type(module), weight.shape, bias is None, _settings(module))
        if kind not in asked:
            asked[kind] = find_router(module, dtype)
        if (found := asked[kind]) is not None:
            correction, gate_bias = (None, bias) if found.gate_bias else (bias, None)
            router = Router(found, weight.detach(), correction, gate_bias=gate_bias, check_finite=False)
            module.forward = FusedRouter(module, router, dtype)
            count += 1
    return count


def _settings(module: nn.Module) -> tuple[tuple[str, Any], ...]:
    """Return the names and values of what two routers of a class may differ in, beside their tensors.

    Objects, such as a configuration or a function, are told apart by what they are, not by what they contain.
    """
    common = vars(nn.Module()).keys()
    plain = (int, float, str)
    return tuple(
        (k, v if isinstance(v, plain) else id(v)) for k, v in vars(module).items() if k not in common
    )


def find_router(module: nn.Module, dtype: torch.dtype) -> RouterConfig | None:
    """Return by which rule ``module`` routes tokens in ``dtype``, or None if it is no router of xpar's."""
    weight, bias = _tensors(module)
    top_k = getattr(module, "top_k", None)
    if weight is None or not isinstance(top_k, int) or "forward" in vars(module):
        return None
    draw = torch.Generator().manual_seed(0)
    trial, x, gate, vector = _trial(module, weight, bias, draw)
    own = _outputs(trial, x, top_k)
    if own is None:
        return None
    is_gate_bias = vector is not None and _is_close(own[0], functional.linear(x, gate, vector))
    if not is_gate_bias and not _is_close(own[0], functional.linear(x, gate)):
        return None
    correction = None if is_gate_bias else vector
    candidates = _candidates(module, top_k, correction is not None)
    found = next((c for c in candidates if _agrees(own, Router(c, None, correction))), None)
    logits_dtype = _logits_dtype(trial, x.to(dtype), top_k, gate, vector if is_gate_bias else None)
    if found is None or logits_dtype is None:
        return None
    return replace(found, logits_dtype=logits_dtype, gate_bias=is_gate_bias)


def _tensors(module: nn.Module) -> tuple[Tensor | None, Tensor | None]:
    """Return the gate [E, H] of a router and its bias [E], of the gate or of the choice, if it has one.

    Both are None for a module with other tensors.
    """
    own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
    matrices = [x for _, x in own if x.ndim == 2 and not x.is_meta]
    vectors = [x for _, x in own if x.ndim == 1 and not x.is_meta]
    known = len(matrices) == 1 and len(vectors) <= 1 and len(own) == 1 + len(vectors)
    if not known or any(True for _ in module.children()):
        return None, None
    if vectors and vectors[0].shape[0] != matrices[0].shape[0]:
        return None, None
    return matrices[0], vectors[0] if vectors else None


def _trial(
    module: nn.Module, weight: Tensor, bias: Tensor | None, draw: torch.Generator
) -> tuple[nn.Module, Tensor, Tensor, Tensor | None]:
    """Copy ``module`` to the host with random tensors, in float32.

    Also returns tokens [T, H], the copy's gate and its bias.
    """
    trial = copy.copy(module)
    trial._parameters, trial._buffers = dict(module._parameters), dict(module._buffers)
    x = torch.randn(ROWS, weight.shape[1], generator=draw)
    gate = torch.randn(weight.shape, generator=draw) / weight.shape[1] ** 0.5
    correction = None if bias is None else 0.3 * torch.randn(bias.shape, generator=draw)
    for tensors in (trial._parameters, trial._buffers):
        for name, old in tensors.items():
            new = gate if old is weight else correction if old is not None and old is bias else None
            if new is not None:
                tensors[name] = nn.Parameter(new, False) if tensors is trial._parameters else new  # type: ignore[assignment]
    return trial, x, gate, correction


@torch.no_grad()
def _outputs(trial: nn.Module, x: Tensor, top_k: int) -> tuple[Tensor, Tensor, Tensor] | None:
    """Return logits [T, E], weights [T, k] and ids [T, k] that a router gives, or None if it is none."""
    try:
        out = trial.forward(x)
        logits, weights, ids = out
        shape = (len(x), top_k)
        is_router = weights.shape == shape == ids.shape and not ids.is_floating_point() and logits.ndim == 2
    except Exception:  # noqa: BLE001 - any module may be tried
        return None
    return (logits, weights, ids) if is_router else None


def _candidates(module: Any, top_k: int, has_bias: bool) -> Iterator[RouterConfig]:
    def number(names: tuple[str, ...], kinds: Any) -> list[Any]:
        return [v for v in (getattr(module, name, None) for name in names) if isinstance(v, kinds)]

    groups = [(n, kept) for n in number(GROUPS, int) for kept in number(KEPT, int) if 0 < kept < n]
    scales = dict.fromkeys((1.0, *map(float, number(SCALE, (int, float)))))
    for scoring, renormalize, scale in product(("softmax", "sigmoid"), (True, False), scales):
        for n, kept in [*groups, (1, 1)]:
            for group_score in ("max", "top2_sum") if n > 1 else ("max",):
                yield RouterConfig(
                    top_k,
                    scoring,
                    renormalize,
                    n,
                    kept,
                    group_score,
                    correction_bias=has_bias,
                    routed_scaling_factor=scale,
                )


def _agrees(own: tuple[Tensor, Tensor, Tensor], router: Router) -> bool:
    """Return whether ``router`` chooses the same experts with the same weights, in any order."""
    logits, weights, ids = own
    try:
        routing = router.route(None, logits)
    except ValueError:  # groups that do not divide the experts
        return False
    (a, first), (b, second) = ids.long().sort(dim=1), routing.topk_ids.long().sort(dim=1)
    return torch.equal(a, b) and _is_close(weights.gather(1, first), routing.topk_weights.gather(1, second))


def _logits_dtype(trial: nn.Module, x: Tensor, top_k: int, gate: Tensor, bias: Tensor | None) -> Any:
    """Return whether logits of tokens ``x`` [T, H] are products in their dtype or in float32, or None."""
    for name, parameter in trial._parameters.items():
        trial._parameters[name] = None if parameter is None else nn.Parameter(parameter.to(x.dtype), False)
    own = _outputs(trial, x, top_k)
    if own is None:
        return None
    gate, bias = gate.to(x.dtype), None if bias is None else bias.to(x.dtype)
    wide = functional.linear(x.float(), gate.float(), None if bias is None else bias.float())
    if _is_close(own[0].float(), wide):
        return "float32"
    return "model" if torch.equal(own[0].float(), functional.linear(x, gate, bias).float()) else None


def _is_close(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and bool((a - b).norm() <= TOLERANCE * b.norm())
