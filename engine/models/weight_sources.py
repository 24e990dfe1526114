"""The stored tensors that each parameter of a model is made of, by transformers' own mapping.

transformers keeps, for every family, the renamings and conversions from published tensor names to its modules
(``conversion_mapping``). They are applied to names alone here: nothing is read.
"""

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from xpar.engine.architectures.stored_names import standalone_name
from xpar.engine.checkpoint.reader import Checkpoint, CheckpointError

FLOATS = frozenset({"F64", "F32", "F16", "BF16"})
"""The dtypes that are read; all others are codes whose scales are not."""


@dataclass(frozen=True, eq=False)
class Source:
    """The stored tensors of one parameter, or of several that one conversion makes.

    Attributes:
        names: Tensor names by the converter's pattern, both in transformers' order. Without a converter it is
            one tensor, unchanged.
        converter: transformers' ``WeightConverter``, or None.
        targets: The parameters that the conversion makes.
    """

    names: Mapping[str, tuple[str, ...]]
    converter: Any
    targets: tuple[str, ...]

    @property
    def name(self) -> str | None:
        """The one stored tensor that is the parameter, or None where it must be converted."""
        return None if self.converter is not None else next(iter(self.names.values()))[0]

    @property
    def operations(self) -> tuple[Any, ...]:
        """The steps of the conversion; none for a tensor that is stored as it is."""
        return () if self.converter is None else tuple(self.converter.operations)

    def convert(self, model: Any, checkpoint: Checkpoint) -> dict[str, Tensor]:
        """Read the tensors and convert them; return the parameters of ``targets`` by name.

        Raises :class:`CheckpointError` for tensors that cannot be read or do not fit together.
        """
        converter = deepcopy(self.converter)
        for pattern, names in self.names.items():
            for name in names:
                tensor = read_floats(checkpoint, name)
                converter.add_tensor(self.targets[0], name, pattern, tensor)
        try:
            made = converter.convert(self.targets[0], model=model, config=model.config)
        except (RuntimeError, ValueError, IndexError, KeyError, AttributeError) as error:
            raise CheckpointError(
                f"{checkpoint.path}: transformers does not make {self.targets[0]} of the tensors that are "
                f"stored for it ({' '.join(str(error).split())[:200]}); config and weights are not of the "
                "same model"
            ) from None
        return {key: value[0] if isinstance(value, list) else value for key, value in made.items()}


def read_floats(checkpoint: Checkpoint, name: str) -> Tensor:
    """Read tensor ``name`` whole; raise :class:`CheckpointError` for one that is quantised."""
    stored = checkpoint.entry(name).dtype
    if stored not in FLOATS:
        raise CheckpointError(
            f"tensor {name} is stored as {stored}: quantised weights need scales that are not read; "
            "convert the checkpoint to bfloat16 first"
        )
    return checkpoint.read(name)


def find_sources(model: Any, checkpoint: Checkpoint) -> dict[str, Source]:
    """Map each parameter and buffer of ``model`` that the checkpoint has to its stored tensors.

    Names are tried as they are, as if the language model stood alone, and as if it was saved without a head.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import (
        WeightConverter,
        WeightRenaming,
        dot_natural_key,
        rename_source_key,
    )

    transforms = get_model_conversion_mapping(model)
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    by_pattern = {pattern: c for c in converters for pattern in c.source_patterns}
    state, prefix = model.state_dict(), model.base_model_prefix
    root = next(iter(state)).partition(".")[0]
    plain: dict[str, str] = {}
    parts: dict[str, dict[str, list[str]]] = {}
    for name in sorted(checkpoint.names(), key=dot_natural_key):
        for candidate in dict.fromkeys((name, standalone_name(name), f"{root}.{name}")):
            key, pattern = rename_source_key(candidate, renamings, converters, prefix, state)
            if key not in state and candidate in state:
                key, pattern = candidate, None
            if key not in state:
                continue
            if pattern is None:
                plain.setdefault(key, name)
            else:
                parts.setdefault(key, {}).setdefault(pattern, []).append(name)
            break
    found = {key: Source({"": (name,)}, None, (key,)) for key, name in plain.items()}
    for key, names in parts.items():
        converter = by_pattern[next(iter(names))]
        ordered = {p: tuple(names[p]) for p in converter.source_patterns if p in names}
        first, *others = converter.target_patterns
        targets = (key, *(key.replace(first, other) for other in others))
        source = Source(ordered, converter, targets)
        found.update({target: source for target in targets if target not in plain})
    return found
