"""Families whose language model is one part of a larger one: its config is an object, its tensors have a prefix."""

from dataclasses import fields, is_dataclass, replace
from typing import Any

from xpar.engine.architectures.schema import Architecture, Key, LayerPattern, Rule
from xpar.engine.architectures.stacked import LLAMA4


def part_of(
    arch: Architecture, model_type: str, model_class: str, *, config: str, tensors: str
) -> Architecture:
    """``arch`` with its keys inside the object ``config`` and its tensors' names behind ``tensors``."""

    def moved(value: Any) -> Any:
        if isinstance(value, Key):
            return Key(tuple(f"{config}.{name}" for name in value.names), value.default)
        if isinstance(value, str):
            return tensors + value if "{layer}" in value else value
        if isinstance(value, Rule):
            return replace(value, key=f"{config}.{value.key}")
        if isinstance(value, tuple):
            return tuple(moved(item) for item in value)
        if is_dataclass(value) and not isinstance(value, type):
            parts = {field.name: moved(getattr(value, field.name)) for field in fields(value)}
            if isinstance(value, LayerPattern):
                parts["kinds"] = tuple(f"{config}.{name}" for name in value.kinds)
            return replace(value, **parts)
        return value

    inner: Architecture = moved(arch)
    groups_if = None if arch.groups_if is None else (f"{config}.{arch.groups_if[0]}", arch.groups_if[1])
    return replace(inner, model_type=model_type, model_class=model_class, groups_if=groups_if)


LLAMA4_VISION = part_of(
    LLAMA4,
    "llama4",
    "Llama4ForConditionalGeneration",
    config="text_config",
    tensors="language_model.",
)
