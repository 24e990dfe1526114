"""Families whose language model is one part of a larger model."""

from dataclasses import fields, is_dataclass, replace
from typing import Any

from xpar.engine.architectures.config_key import Key
from xpar.engine.architectures.schema import Architecture, BlockSchema, HashSchema, LayerPattern, Rule


def part_of(
    arch: Architecture, model_type: str, model_class: str, *, config: str, tensors: str, in_place_of: str = ""
) -> Architecture:
    """Describe the family of larger models that contain a language model of ``arch``.

    ``block`` stays as it is, because transformers loads the language model alone. ``synthetic`` is dropped.

    Args:
        arch: the family of the language model.
        model_type: the name of the new family.
        model_class: its entry in the ``architectures`` list of ``config.json``.
        config: the object of ``config.json`` that has the keys of ``arch``.
        tensors: the beginning of the tensors' names in the larger model.
        in_place_of: the beginning that is dropped from the names in ``arch``.
    """

    def nest(value: Any) -> Any:
        if isinstance(value, Key):
            return Key(tuple(f"{config}.{name}" for name in value.names), value.default)
        if isinstance(value, str):
            return tensors + value.removeprefix(in_place_of) if "{layer}" in value else value
        if isinstance(value, Rule):
            return replace(value, key=f"{config}.{value.key}")
        if isinstance(value, BlockSchema):
            return value
        if isinstance(value, tuple):
            return tuple(nest(item) for item in value)
        if is_dataclass(value) and not isinstance(value, type):
            parts = {field.name: nest(getattr(value, field.name)) for field in fields(value)}
            if isinstance(value, LayerPattern | HashSchema):
                parts["kinds"] = tuple(f"{config}.{name}" for name in value.kinds)
            return replace(value, **parts)
        return value

    inner: Architecture = nest(replace(arch, synthetic=None))
    groups_if = None if arch.groups_if is None else (f"{config}.{arch.groups_if[0]}", arch.groups_if[1])
    return replace(inner, model_type=model_type, model_class=model_class, groups_if=groups_if)
