"""Rules that take the k best experts: by scores, within the best groups, or by the logits themselves."""

import math
from dataclasses import replace

import torch
from torch import Tensor

from xpar.engine.config import TINY, RouterConfig, check_groups
from xpar.engine.routing.rule import finish_weights, required, scores_of
from xpar.kernels.contracts import Routing
from xpar.kernels.stable_topk import stable_topk

NEEDS_LOGITS = "this rule scores them; let a gate compute them"


class TopKRule:
    """A rule that takes the k best scores of all experts; the scores are the weights.

    With groups, only the experts of the best groups can be chosen (DeepSeek-V2, arXiv:2405.04434, section
    2.2.2).

    Args:
        config: The router.
        correction_bias: ``[E]`` float32, which takes part in the choice but not in the weights (DeepSeek-V3,
            arXiv:2412.19437, eq. 16).
        expert_scale: ``[E]`` float32 factors on the weights (Gemma-4).
    """

    def __init__(
        self,
        config: RouterConfig,
        correction_bias: Tensor | None = None,
        expert_scale: Tensor | None = None,
    ) -> None:
        self.config, self.correction_bias, self.expert_scale = config, correction_bias, expert_scale

    def route(
        self, hidden_states: Tensor | None, router_logits: Tensor | None, input_ids: Tensor | None = None
    ) -> Routing:
        """Route by ``router_logits`` alone."""
        logits = required(router_logits, "router_logits", NEEDS_LOGITS)
        if logits.is_cuda and self._has_kernel():
            return self._one_kernel(logits)
        scores = scores_of(logits, self.config.scoring)
        choice = scores if self.correction_bias is None else scores + self.correction_bias
        if self.config.topk_group < self.config.num_expert_group:
            choice = keep_best_groups(choice, self.config)
        topk_ids = stable_topk(choice, self.config.top_k)
        topk_weights = finish_weights(scores.gather(-1, topk_ids), topk_ids, self.config, self.expert_scale)
        return Routing(topk_ids.to(torch.int32), topk_weights, self.config.weight_on_input)

    def _has_kernel(self) -> bool:
        c = self.config
        return c.scoring != "sqrtsoftplus" and self.expert_scale is None and c.renormalize_min == TINY

    def _one_kernel(self, logits: Tensor) -> Routing:
        """Route on a GPU in one kernel, whose scores stay in registers."""
        from xpar.kernels.gpu.route import select_experts

        c = self.config
        check_groups(c, logits.shape[1])
        assert c.scoring != "sqrtsoftplus"
        chosen = select_experts(
            logits,
            c.top_k,
            scoring=c.scoring,
            renormalize=c.renormalize,
            num_expert_group=c.num_expert_group,
            topk_group=c.topk_group,
            group_score=c.group_score,
            correction_bias=self.correction_bias,
            routed_scaling_factor=c.routed_scaling_factor,
        )
        return replace(chosen, weight_on_input=c.weight_on_input)


class TopKLogitsRule:
    """A rule that takes the k best logits, scored among themselves.

    With softmax (gpt-oss, Granite) it is the same as softmax over all experts and renormalisation, without
    the underflow. With sigmoid it serves Cohere-2, and Llama-4 with k = 1 and the weight on the input.
    """

    def __init__(self, config: RouterConfig, expert_scale: Tensor | None = None) -> None:
        self.config, self.expert_scale = config, expert_scale

    def route(
        self, hidden_states: Tensor | None, router_logits: Tensor | None, input_ids: Tensor | None = None
    ) -> Routing:
        """Route by ``router_logits`` alone."""
        logits = required(router_logits, "router_logits", NEEDS_LOGITS).float()
        topk_ids = stable_topk(logits, self.config.top_k)
        chosen = scores_of(logits.gather(-1, topk_ids), self.config.scoring)
        topk_weights = finish_weights(chosen, topk_ids, self.config, self.expert_scale)
        return Routing(topk_ids.to(torch.int32), topk_weights, self.config.weight_on_input)


def keep_best_groups(choice: Tensor, config: RouterConfig) -> Tensor:
    """Set ``choice`` [T, E] to minus infinity for experts outside the best ``topk_group`` groups."""
    tokens, experts = choice.shape
    check_groups(config, experts)
    groups = choice.view(tokens, config.num_expert_group, experts // config.num_expert_group)
    if config.group_score == "max":
        group_scores = groups.amax(dim=-1)
    else:
        group_scores = groups.topk(2, dim=-1).values.sum(dim=-1)
    dropped = torch.ones_like(group_scores, dtype=torch.bool)
    dropped.scatter_(-1, stable_topk(group_scores, config.topk_group), False)
    return groups.masked_fill(dropped.unsqueeze(-1), -math.inf).view(tokens, experts)
