"""The names under which a checkpoint stores a layer's tensors.

An :class:`~xpar.engine.architectures.schema.Architecture` has one spelling of each name. Tools that write
checkpoints have several: transformers 5 can save experts stacked and under the names of its own modules, and
a language model inside a larger model has a longer prefix. Each part of a layer is looked up by itself,
because transformers renames tensor by tensor, too.
"""

from collections.abc import Collection, Iterator
from dataclasses import fields, is_dataclass, replace
from itertools import product
from typing import Any

from xpar.engine.architectures.schema import Architecture, MlpNames, Renaming
from xpar.engine.checkpoint.reader import Checkpoint

PARTS = (
    "gate",
    "gate_bias",
    "correction_bias",
    "output_bias",
    "expert_scale",
    "experts",
    "shared",
    "latent",
    "hash_routing",
    "norm",
)
"""The fields of :class:`~xpar.engine.architectures.schema.Architecture` that hold names of tensors."""
NESTED = (
    ("model.language_model.", "model."),
    ("language_model.model.", "model."),
    ("language_model.", ""),
)
"""(Prefix of a language model inside a larger model, prefix of the same tensors in the model by itself)."""


def resolve_names(checkpoint: Checkpoint, arch: Architecture, layer: int) -> Architecture:
    """Spell the tensor names of ``arch`` as ``checkpoint`` has them for ``layer``.

    A part that the checkpoint has under no known spelling keeps the family's usual names; the error about the
    missing tensor then says those.
    """
    stored = checkpoint.names()
    found: dict[str, Any] = {}
    for part in PARTS:
        value = getattr(arch, part)
        if value is not None:
            candidates = spellings(value, arch.renamings)
            found[part] = next((v for v in candidates if _is_stored(v, stored, layer)), value)
    return replace(arch, **found)


def spellings(value: Any, renamings: tuple[Renaming, ...]) -> Iterator[Any]:
    """Yield every known spelling of ``value``, a part of a family with names.

    The usual spelling comes first.
    """
    for form in (value, stacked_form(value)):
        if form is None:
            continue
        for is_applied in product((False, True), repeat=len(renamings)):
            chosen = [r for r, applied in zip(renamings, is_applied, strict=True) if applied]
            for number in range(len(_prefixes(""))):
                yield _respell(form, chosen, number)


def stacked_form(value: Any) -> MlpNames | None:
    """Name the experts of ``value`` as transformers 5 saves them, in tensors of all experts.

    transformers stacks [I, H] of each expert into [E, I, H], gate rows above up rows. The result is None if
    ``value`` does not name separate experts.
    """
    if not isinstance(value, MlpNames) or "{expert}" not in value.down:
        return None
    prefix = value.down.partition(".{expert}")[0]
    gated = value.is_gated
    return MlpNames(
        gate=None,
        up=None if gated else f"{prefix}.up_proj",
        gate_up=f"{prefix}.gate_up_proj" if gated else None,
        down=f"{prefix}.down_proj",
        storage="stacked",
    )


def standalone_name(name: str) -> str:
    """Name a language model's tensor ``name`` as in the model by itself."""
    for nested, plain in NESTED:
        if name.startswith(nested):
            return plain + name.removeprefix(nested)
    return name


def _prefixes(name: str) -> tuple[str, ...]:
    """List ``name`` as it is, and with the prefixes of models by themselves, larger and headless."""
    plain = standalone_name(name)
    bare = plain.partition(".")[2]
    return (
        name,
        plain,
        f"language_model.{plain}",
        f"model.language_model.{bare}",
        bare,
        f"language_model.{bare}",
    )


def _respell(value: Any, renamings: list[Renaming], number: int) -> Any:
    """Apply ``renamings`` and prefix ``number`` of :func:`_prefixes` to each name in ``value``."""
    if isinstance(value, str) and "{layer}" in value:
        for old, new in renamings:
            value = value.replace(old, new)
        return _prefixes(value)[number]
    if is_dataclass(value) and not isinstance(value, type):
        return replace(
            value,
            **{f.name: _respell(getattr(value, f.name), renamings, number) for f in fields(value)},
        )
    return value


def _is_stored(value: Any, stored: Collection[str], layer: int) -> bool:
    """Return whether ``stored`` has every tensor of ``value``; of separate experts, the first."""
    return all(name.format(layer=layer, expert=0) in stored for name in _names(value))


def _names(value: Any) -> Iterator[str]:
    """Yield the names of tensors in ``value``."""
    if isinstance(value, str) and "{layer}" in value:
        yield value
    elif is_dataclass(value) and not isinstance(value, type):
        for f in fields(value):
            yield from _names(getattr(value, f.name))
