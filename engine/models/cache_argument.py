"""The name of the argument in which a model of transformers takes its cache, and of the output that has it.

Until 5.23 it is ``past_key_values``, from 5.24 on ``cache``, of which the former is a deprecated name.
"""

from functools import lru_cache
from inspect import signature
from typing import Any


def cache_argument(model: Any, cache: Any) -> dict[str, Any]:
    """Return the keyword argument that hands ``cache``, or None, to ``model``."""
    kind: Any = type(model)
    return {_name(kind): cache}


def cache_of(output: Any) -> Any:
    """Return the cache in the ``output`` of a forward, or in the inputs that were prepared for one."""
    return output.get("cache", output.get("past_key_values"))


@lru_cache(maxsize=64)
def _name(model: Any) -> str:
    return "cache" if "cache" in signature(model.forward).parameters else "past_key_values"
