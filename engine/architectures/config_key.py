"""A value of ``config.json``, read by the names that a family gives it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from xpar.engine.checkpoint.tensor_file import CheckpointError


@dataclass(frozen=True)
class Key:
    """A value of ``config.json``, by one or more names.

    It is that of the first of ``names`` that is there and not null, else ``default``. The name ``a.b`` is key
    b of the object a. A key without names is a constant of the family. A key without a default is required.
    """

    names: tuple[str, ...] = ()
    default: Any = None

    def get(self, config: Mapping[str, Any], kind: type, layer: int = 0) -> Any:
        """Return the value, checked to be a ``kind``: int, float, bool, str or list.

        If the config has a list and ``kind`` is no list, the value is the list's entry for ``layer``. Raises
        :class:`CheckpointError` for a missing or mistyped value.
        """
        name = next((n for n in self.names if lookup(config, n) is not None), None)
        if name is None and self.default is None:
            raise CheckpointError(f"config.json: {' or '.join(self.names)} is missing; the family needs it")
        if name is None:
            return self.default
        value = lookup(config, name)
        if isinstance(value, list) and kind is not list:
            if layer >= len(value):
                raise CheckpointError(f"config.json: {name} has {len(value)} values, none for layer {layer}")
            value = value[layer]
        accepted = (int, float) if kind is float else kind
        if not isinstance(value, accepted) or (isinstance(value, bool) and kind is not bool):
            raise CheckpointError(f"config.json: {name}={value!r} must be of type {kind.__name__}")
        return value


def lookup(config: Mapping[str, Any], name: str) -> Any:
    """Return ``config[name]``, or None; the name ``a.b`` looks into the object ``a``."""
    value: Any = config
    for part in name.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def has_key(config: Mapping[str, Any], name: str) -> bool:
    """Return whether ``config`` has the key ``name`` at all, be its value null."""
    *path, last = name.split(".")
    inner = lookup(config, ".".join(path)) if path else config
    return isinstance(inner, Mapping) and last in inner
