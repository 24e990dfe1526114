"""The config of a checkpoint as transformers reads it."""

from pathlib import Path
from typing import Any

from xpar.engine.checkpoint.reader import CheckpointError

EXTRAS = ("output_router_logits", "output_hidden_states", "output_attentions")
"""What a forward returns besides logits and cache where a config asks for it."""


def read_hf_config(path: Path) -> Any:
    """Read the config of the checkpoint at ``path``, for inference.

    What training or debugging left in it to make a forward return more, or a tuple, is set aside. Raises
    :class:`CheckpointError` for a config that transformers refuses, with its reason.
    """
    from transformers import AutoConfig

    try:
        hf_config = AutoConfig.from_pretrained(path)
    except Exception as error:  # noqa: BLE001 - transformers' checks raise errors of many types
        reason = " ".join(str(error.__cause__ or error).split())
        raise CheckpointError(f"{path / 'config.json'}: transformers does not take it: {reason}") from None
    for config in {id(c): c for c in (hf_config, hf_config.get_text_config())}.values():
        config.return_dict = True
        for name in EXTRAS:
            if getattr(config, name, None):
                setattr(config, name, False)
    return hf_config
