"""The second half of a causal language model: from hidden states to logits, some rows at a time.

T tokens, V vocabulary, H hidden size.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from xpar.engine.models.attention import backends

LOGITS_BYTES = 64 * 2**20
"""Of float32 logits at a time: those of a long text would be larger than the model."""


class Head:
    """A causal language model in two halves: hidden states first, then the logits of some of them at a time.

    The second half is the model's own forward around hidden states that are there already, so that whatever a family
    does to its logits (Granite and Cohere scale them) is done.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        self._known = _Known()

    def hidden_states(self, **inputs: Any) -> Tensor:
        """[B, S, H] after the last layer; ``inputs`` are transformers'."""
        with backends(next(self._model.parameters()).device):
            out: Tensor = self._model.base_model(**inputs).last_hidden_state
        return out

    def logits(self, hidden_states: Tensor) -> Tensor:
        """[T, H] -> [T, V], in the model's dtype."""
        name = self._model.base_model_prefix
        base = self._model._modules[name]
        self._known.hidden_states = hidden_states[None]
        self._model._modules[name] = self._known
        try:
            ids = torch.zeros(1, hidden_states.shape[0], dtype=torch.int64, device=hidden_states.device)
            out: Tensor = self._model(input_ids=ids, use_cache=False).logits
            return out[0]
        finally:
            self._model._modules[name] = base
            self._known.hidden_states = None

    def scores(self, hidden_states: Tensor, targets: Tensor) -> Iterator[tuple[list[float], bool]]:
        """[T, H], [T] -> log-probabilities of ``targets``, and whether all are the likeliest, some rows at a time.

        Raises ValueError for logits that are not finite.
        """
        rows = max(1, LOGITS_BYTES // (4 * self._model.config.get_text_config().vocab_size))
        for begin in range(0, len(targets), rows):
            wanted = targets[begin : begin + rows]
            logits = self.logits(hidden_states[begin : begin + rows]).float()
            chosen = logits.gather(1, wanted[:, None])[:, 0] - logits.logsumexp(dim=1)
            if not bool(torch.isfinite(chosen).all()):
                raise ValueError(
                    "the model's logits are not finite; check the checkpoint, or use another --dtype"
                )
            yield chosen.tolist(), bool((logits.argmax(dim=1) == wanted).all())


class _Known(torch.nn.Module):
    """Stands where the model's layers stand, and gives what they gave."""

    hidden_states: Tensor | None = None

    def forward(self, *_: object, **__: object) -> Any:
        from transformers.modeling_outputs import MoeModelOutputWithPast

        return MoeModelOutputWithPast(last_hidden_state=self.hidden_states)
