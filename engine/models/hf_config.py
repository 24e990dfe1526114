"""The config of a checkpoint as transformers reads it, and one line for everything that transformers refuses.

transformers checks the types of most values, few sizes, and reports the rest by exceptions of many types from
within its model code. The sizes are therefore checked first, by :func:`check_numbers`.
"""

import json
import logging
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from xpar.engine.checkpoint.reader import CheckpointError, read_json
from xpar.engine.layer.checkpoint_config import POSITIVE, SIZE, check_numbers
from xpar.engine.models.malloc import without_collection

__all__ = ["check_numbers", "read_hf_config", "transformers_errors"]

log = logging.getLogger("xpar.models")
EXTRAS = ("output_router_logits", "output_hidden_states", "output_attentions")
"""Keys with which a config asks that a forward returns more than logits and cache."""
WRONG_TYPE = re.compile(
    r"[Ff]ield '(?P<key>\w+)'.*? expected (?P<type>.+?), got \w+ \(value: (?P<value>.*)\)$"
)
"""How transformers reports a value of the wrong type."""


@without_collection()
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
        if hasattr(config, "quantization_config"):
            del config.quantization_config  # weights come as floats, and no quantizer is to look for packages
        config.return_dict = True
        for name in EXTRAS:
            if getattr(config, name, None):
                setattr(config, name, False)
    return hf_config


@contextmanager
def transformers_errors(file: Path, values: Mapping[str, Any] | None = None) -> Iterator[None]:
    """Turn every exception of transformers about ``file`` into one :class:`CheckpointError` of one line.

    The traceback goes to the log, where ``-v`` shows it. Where the exception names no key, the message lists
    the ``values`` that it shows, or else the sizes that are null, or else all sizes.
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
    quoted = set(re.findall(r"(?:=|')(-?\w[\w.]*)", text))
    keys = [key for key in values if key in named]
    keys = keys or [
        key for key, value in values.items() if _may_be_named(key, value) and str(value) in quoted
    ]
    if not keys:
        nulls = [key for key in values if SIZE.search(key) and values[key] is None]
        keys = nulls or [key for key in values if POSITIVE.search(key)]
    given = ", ".join(f"{key}={shorten(json.dumps(values[key]))}" for key in keys if key in values)
    return f"transformers does not take it: {text}{f' (given: {given})' if given else ''}"


def _may_be_named(key: str, value: Any) -> bool:
    """Return whether a message that shows ``value`` may mean ``key``: a size, or a word."""
    return isinstance(value, str) or (type(value) is int and SIZE.search(key) is not None)


def shorten(text: str, most: int = 60) -> str:
    """Cut ``text`` after ``most`` characters, with an ellipsis for what is left out."""
    return text if len(text) <= most else f"{text[:most]}…"
