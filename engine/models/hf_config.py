"""The config of a checkpoint as transformers reads it, and one line for everything that transformers refuses.

transformers checks the types of most values, few sizes, and reports the rest by exceptions of many types from
within its model code. The sizes are therefore checked here first, by the words that their names are made of.
"""

import json
import logging
import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from xpar.engine.architectures.layer_config import MAX_LAYERS
from xpar.engine.checkpoint.reader import CheckpointError, read_json

log = logging.getLogger("xpar.models")
EXTRAS = ("output_router_logits", "output_hidden_states", "output_attentions")
"""Keys with which a config asks that a forward returns more than logits and cache."""
SIZE = re.compile(r"^(num|n)_|_(size|dim|heads|layers|rank)$|^max_(position_embeddings|seq_len)$|^d_model$")
"""The names of keys that give a size or a count."""
POSITIVE = re.compile(
    r"^(vocab_size|(hidden|intermediate|ffn_hidden)_size|d_model|head_dim|max_(position_embeddings|seq_len)"
    r"|(num|n)_(hidden_)?layers|(num|n)_(attention_|key_value_)?heads)$"
)
"""The names of sizes that no model has as 0."""
MAX_EXPERTS = 2**16
"""More experts than any layer has; transformers makes modules, or lists, of as many."""
LARGEST = 2**31 - 1
"""The largest size that is taken for one."""
WRONG_TYPE = re.compile(
    r"[Ff]ield '(?P<key>\w+)'.*? expected (?P<type>.+?), got \w+ \(value: (?P<value>.*)\)$"
)
"""How transformers reports a value of the wrong type."""


def read_hf_config(path: Path) -> Any:
    """Read the config of the checkpoint at ``path``, for inference.

    Entries by which training or debugging made a forward return more, or a tuple, are set aside. Raises
    :class:`CheckpointError` of one line for a config that cannot be that of a model.
    """
    from transformers import AutoConfig

    file = path / "config.json"
    values = read_json(file)
    check_numbers(file, values)
    with transformers_errors(file, values):
        hf_config = AutoConfig.from_pretrained(path, trust_remote_code=False)
        configs = {id(c): c for c in (hf_config, hf_config.get_text_config())}.values()
    for config in configs:
        config.return_dict = True
        for name in EXTRAS:
            if getattr(config, name, None):
                setattr(config, name, False)
    return hf_config


def check_numbers(file: Path, values: Mapping[str, Any], prefix: str = "") -> None:
    """Raise :class:`CheckpointError` for the first value that is not finite, or an impossible size."""
    padding, rows = values.get("pad_token_id"), values.get("vocab_size")
    if isinstance(padding, int) and isinstance(rows, int) and padding >= rows > 0:
        raise CheckpointError(f"{file}: {prefix}pad_token_id={padding}: must be less than vocab_size={rows}")
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            check_numbers(file, value, f"{name}.")
        if isinstance(value, float) and not math.isfinite(value):
            raise CheckpointError(f"{file}: {name}={value}: must be a finite number")
        # Latent attention without rotary dimensions (GLM-5-Next) calls those the width of a head.
        is_rotary_width = key == "head_dim" and values.get("qk_rope_head_dim") == 0
        least = int(bool(POSITIVE.search(key)) and not is_rotary_width)
        most = MAX_LAYERS if key.endswith("layers") else MAX_EXPERTS if key.endswith("experts") else LARGEST
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if is_number and SIZE.search(key) and not least <= value <= most:
            raise CheckpointError(f"{file}: {name}={value}: must be {least} to {most}")


@contextmanager
def transformers_errors(file: Path, values: Mapping[str, Any] | None = None) -> Iterator[None]:
    """Turn every exception of transformers about ``file`` into one :class:`CheckpointError` of one line.

    The traceback goes to the log, where ``-v`` shows it. Where the exception names no key, the message lists
    the sizes among ``values`` that are null, or else all.
    """
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:
        log.debug("%s: transformers raised", file, exc_info=error)
        raise CheckpointError(f"{file}: {_in_one_line(error, values or {})}") from None


def _in_one_line(error: Exception, values: Mapping[str, Any]) -> str:
    reason = error.__cause__ or error
    text = " ".join(str(reason).split()) or type(reason).__name__
    if found := WRONG_TYPE.search(text):
        return f"{found['key']}={found['value']}: must be of type {found['type']}, says transformers"
    if len(text) > 300:
        text = f"{text[:300]}…"
    named = set(re.findall(r"\w*_\w+", text))
    keys = [key for key in values if key in named]
    if not keys:
        nulls = [key for key in values if SIZE.search(key) and values[key] is None]
        keys = nulls or [key for key in values if POSITIVE.search(key)]
    given = ", ".join(f"{key}={_short(values[key])}" for key in keys if key in values)
    return f"transformers does not take it: {text}{f' (given: {given})' if given else ''}"


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:60]}…"
