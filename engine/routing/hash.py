"""Routing by token id: a table of the checkpoint chooses, the logits only weigh (DeepSeek-V4)."""

import torch
from torch import Tensor

from xpar.engine.config import RouterConfig
from xpar.engine.routing.rule import finish_weights, required, scores_of
from xpar.engine.routing.topk import NEEDS_LOGITS
from xpar.kernels.contracts import Routing


class HashRule:
    """Routes by a ``table`` [vocabulary, k] of integer expert ids, one row for each token id."""

    def __init__(self, config: RouterConfig, table: Tensor) -> None:
        if table.ndim != 2 or table.shape[1] != config.top_k or not table.shape[0]:
            raise ValueError(
                f"hash table of shape {list(table.shape)}: must be [vocabulary, top_k={config.top_k}]"
            )
        self.config, self.table = config, table.long()
        self._range = int(table.min()), int(table.max())

    def route(
        self, hidden_states: Tensor | None, router_logits: Tensor | None, input_ids: Tensor | None = None
    ) -> Routing:
        """Route by ``router_logits`` [T, E] and ``input_ids`` [T]."""
        logits = required(router_logits, "router_logits", NEEDS_LOGITS)
        ids = required(input_ids, "input_ids", "this layer chooses experts by token id")
        self._check(logits, ids)
        topk_ids = self.table[ids.long()]
        weights = scores_of(logits, self.config.scoring).gather(-1, topk_ids)
        return Routing(topk_ids.to(torch.int32), finish_weights(weights, topk_ids, self.config, None))

    def _check(self, logits: Tensor, ids: Tensor) -> None:
        if ids.shape != logits.shape[:1]:
            raise ValueError(f"input_ids of shape {list(ids.shape)} for {logits.shape[0]} tokens")
        if self._range[0] < 0 or self._range[1] >= logits.shape[-1]:
            raise ValueError(
                f"the hash table holds experts {self._range[0]} to {self._range[1]}, the layer has 0 to "
                f"{logits.shape[-1] - 1}; table and layer are not of the same model"
            )
        outside = (ids < 0) | (ids >= self.table.shape[0])
        if bool(outside.any()):
            token = int(outside.nonzero()[0])
            raise ValueError(
                f"input_ids of token {token} is {int(ids[token])}: the hash table has ids 0 to "
                f"{self.table.shape[0] - 1}"
            )
