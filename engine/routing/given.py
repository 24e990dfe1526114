"""Routing that the caller has chosen already, in the place of a router, as transformers' experts get it."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from xpar.kernels.contracts import Routing
from xpar.kernels.gpu.availability import has_triton

Check = Callable[[Tensor, Tensor, Tensor | None, int], Routing]
"""(topk_ids, topk_weights, padding, experts) -> the routing, in which a row with a wrong id is NaN."""
NOT_FINITE = "router weights are not finite; check the hidden states and the gate weight for NaN or overflow"


class GivenRouting:
    """A router for one call, whose answer is ``topk_ids`` and ``topk_weights``.

    Args:
        topk_ids: ``[T, k]`` integer expert ids, or -1 for a slot that is not used.
        topk_weights: ``[T, k]`` floating weights.
        num_experts: Experts of the layer.
        top_k: Experts of a token.
        check_finite: Refuse weights that are NaN or infinite.
        check: Makes the routing in one launch instead, where what is wrong is to be found in its row alone.
        padding: ``[T]`` bool, true for rows that go to no expert, or None; only with ``check``.
    """

    def __init__(
        self,
        topk_ids: Tensor,
        topk_weights: Tensor,
        num_experts: int,
        top_k: int,
        check_finite: bool = True,
        check: Check | None = None,
        padding: Tensor | None = None,
    ) -> None:
        self.topk_ids, self.topk_weights = topk_ids, topk_weights
        self.num_experts, self.top_k = num_experts, top_k
        self.check_finite, self.check, self.padding = check_finite, check, padding

    def route(
        self,
        hidden_states: Tensor | None,
        router_logits: Tensor | None = None,
        input_ids: Tensor | None = None,
    ) -> Routing:
        """Return the given routing of ``hidden_states`` [T, H]; ValueError if it does not fit.

        On a GPU ids and weights are checked without waiting for them: wrong numbers end the process when it
        next waits for the GPU. With ``check`` a wrong id makes its row NaN.
        """
        if hidden_states is not None:
            self._check_shapes(hidden_states.shape[0])
        if self.check is not None:
            return self.check(self.topk_ids, self.topk_weights, self.padding, self.num_experts)
        if self.topk_ids.is_cuda:
            self._assert_on_gpu()
        else:
            self._check_numbers()
        return Routing(self.topk_ids.to(torch.int32), self.topk_weights.float())

    @staticmethod
    def one_launch(topk_ids: Tensor) -> Check | None:
        """Return what checks a routing like ``topk_ids`` in one launch, or None where nothing does."""
        if not topk_ids.is_cuda or not has_triton():
            return None
        from xpar.kernels.gpu.small_steps import check_routing

        return check_routing

    def _check_shapes(self, tokens: int) -> None:
        expected, ids, weights = (tokens, self.top_k), self.topk_ids.shape, self.topk_weights.shape
        if tuple(ids) != expected or tuple(weights) != expected:
            raise ValueError(
                f"routing of shapes {tuple(ids)} and {tuple(weights)}: expected two of {expected}"
            )

    def _check_numbers(self) -> None:
        ids = self.topk_ids
        if ids.numel() and not -1 <= int(ids.min()) <= int(ids.max()) < self.num_experts:
            raise ValueError(
                f"expert ids {int(ids.min())} to {int(ids.max())}: must be 0 to {self.num_experts - 1}, or "
                "-1 for none"
            )
        if self.check_finite and not math.isfinite(float(self.topk_weights.float().sum())):
            raise ValueError(NOT_FINITE)

    def _assert_on_gpu(self) -> None:
        known = ((self.topk_ids >= -1) & (self.topk_ids < self.num_experts)).all()
        torch._assert_async(known, f"expert ids must be 0 to {self.num_experts - 1}, or -1 for none")
        if self.check_finite:
            torch._assert_async(self.topk_weights.float().sum().isfinite(), NOT_FINITE)
