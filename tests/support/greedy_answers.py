"""The definition of a greedy answer."""

from typing import Any

import torch
from tiny_models import CLEAR

from xpar.engine.generation.running_sequence import RunningSequence


@torch.inference_mode()
def assert_greedy(model: Any, r: RunningSequence) -> None:
    """Check the answer against the definition: no cache, no batch."""
    ids = list(r.ids)
    for token in r.answer:
        best = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].topk(2)
        if best.values[0] - best.values[1] < CLEAR:
            return
        assert token == int(best.indices[0])
        ids.append(token)
