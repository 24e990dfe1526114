"""A stand-in for a loaded model, for tests of batches on one rank."""

from types import SimpleNamespace
from typing import Any

import torch

from xpar.engine.models.kv_cache import other_states


def loaded(model: Any) -> Any:
    """Return ``model`` as ``load_model`` gives it, all experts transformers' own."""
    return SimpleNamespace(
        is_cache_of_keys_and_values=not other_states(model.config),
        dtype=model.dtype,
        model=model,
        device=torch.device("cpu"),
        layers=(),
        ranks_of_node=1,
        slots=lambda: 0,
        expect=lambda tokens: None,
        join=lambda: None,
    )
