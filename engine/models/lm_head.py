"""The second half of a causal language model: hidden states [T, H] to logits [T, V], in parts."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from xpar.engine.models.attention import backends

LOGITS_BYTES = 64 * 2**20
"""Bytes of float32 logits at a time: those of a long text would be larger than the model."""


class Head:
    """A causal language model in two halves: hidden states first, then the logits of some of them at a time.

    The second half is the model's own forward around hidden states that are there already, so that whatever a
    family does to its logits (Granite and Cohere scale them, Gemma bounds them) is done.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        self._owner, self._name = find_decoder(model)
        self._given = _Given(model.get_input_embeddings())

    def hidden_states(self, **inputs: Any) -> Tensor:
        """Compute [B, S, H] after the last layer; ``inputs`` are transformers'."""
        with backends(next(self._model.parameters()).device):
            output = getattr(self._owner, self._name)(**inputs)
        self._given.form = type(output)
        hidden_states: Tensor = output.last_hidden_state
        return hidden_states

    def logits(self, hidden_states: Tensor) -> Tensor:
        """Compute logits [T, V] of [T, H], in the dtype that the model gives them."""
        decoder = self._owner._modules[self._name]
        self._given.hidden_states = hidden_states[None]
        self._owner._modules[self._name] = self._given
        try:
            ids = torch.zeros(1, hidden_states.shape[0], dtype=torch.int64, device=hidden_states.device)
            out: Tensor = self._owner(input_ids=ids, use_cache=False).logits
            return out[0]
        finally:
            self._owner._modules[self._name] = decoder
            self._given.hidden_states = None

    def scores(self, hidden_states: Tensor, targets: Tensor) -> Iterator[tuple[list[float], bool]]:
        """Yield log-probabilities of ``targets`` [T], and if all are likeliest; ValueError if not finite."""
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


def find_head(model: Any) -> Any:
    """Find the module that makes logits of hidden states; None for a model without one.

    A model with images or sound in front may not know the head of the language model inside it.
    """
    inside = (module for module in model.modules() if hasattr(module, "get_output_embeddings"))
    return next((head for module in inside if (head := module.get_output_embeddings()) is not None), None)


def find_decoder(model: Any) -> tuple[Any, str]:
    """Find the module that makes logits and the name of its child that makes hidden states.

    The first has the head, the second the embedding; neither is called alike in all families, and what
    transformers calls ``base_model`` is sometimes neither. Raises ValueError for a model without them.
    """
    head, embedding = find_head(model), model.get_input_embeddings()
    path = next((name for name, module in model.named_modules() if module is head), None)
    if head is not None and path is not None:
        owner = model.get_submodule(path.rpartition(".")[0])
        for name, child in owner.named_children():
            if child is not head and any(module is embedding for module in child.modules()):
                return owner, name
    raise ValueError(f"{type(model).__name__}: has no head beside a decoder; it gives no logits of tokens")


class _Given(torch.nn.Module):
    """A stand-in for the decoder that returns known hidden states in a value of type ``form``."""

    hidden_states: Tensor | None = None
    form: Any = None

    def __init__(self, embeddings: torch.nn.Module) -> None:
        super().__init__()
        self._embeddings = (embeddings,)  # in a tuple, or it would be a part of this module

    def get_input_embeddings(self) -> torch.nn.Module:
        return self._embeddings[0]

    def forward(self, *_: object, **__: object) -> Any:
        from transformers.modeling_outputs import MoeModelOutputWithPast

        return (self.form or MoeModelOutputWithPast)(last_hidden_state=self.hidden_states)
