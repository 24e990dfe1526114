"""What a model family is made of, as data: config keys, tensor names, and the router they describe.

Where a ``config.json`` leaves a key out, the default is that of the family's own configuration class in transformers.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from xpar.engine.tensor_file import CheckpointError


@dataclass(frozen=True)
class Key:
    """A value of ``config.json``: the first of ``names`` that is there and not null, else ``default``.

    No names make it a constant of the family; no default makes it required.
    """

    names: tuple[str, ...] = ()
    default: Any = None

    def get(self, config: Mapping[str, Any], kind: type) -> Any:
        """The value, checked to be a ``kind`` (int, float, bool, str or list)."""
        name = next((n for n in self.names if config.get(n) is not None), None)
        if name is None and self.default is None:
            raise CheckpointError(f"config.json: {' or '.join(self.names)} is missing; the family needs it")
        if name is None:
            return self.default
        value = config[name]
        accepted = (int, float) if kind is float else kind
        if not isinstance(value, accepted) or (isinstance(value, bool) and kind is not bool):
            raise CheckpointError(f"config.json: {name}={value!r} must be of type {kind.__name__}")
        return value


@dataclass(frozen=True)
class LayerPattern:
    """Layer i is MoE if ``i >= first_dense``, ``(i + step_offset) % step == 0`` and i is not in ``dense_list``."""

    count: Key = Key(("num_hidden_layers",))
    first_dense: Key = Key(default=0)
    step: Key = Key(default=1)
    step_offset: int = 0
    dense_list: Key = Key(default=())


@dataclass(frozen=True)
class MlpNames:
    """Tensors of one gated MLP: ``gate`` and ``up`` [I, H], ``down`` [H, I]."""

    gate: str
    up: str
    down: str


@dataclass(frozen=True)
class SharedSchema:
    """Shared experts, stored as one MLP of width ``count * width``; ``gate``: tensor [1, H] of their sigmoid gate."""

    width: Key
    count: Key
    names: MlpNames
    gate: str | None = None


@dataclass(frozen=True)
class Rule:
    """A config key that, when present and not null, must have one of the ``allowed`` values."""

    key: str
    allowed: tuple[object, ...]
    why: str


@dataclass(frozen=True)
class Architecture:
    """A model family. Tensor names are templates with ``{layer}`` and, for experts, ``{expert}``.

    ``model_class``: its entry in the ``architectures`` list of ``config.json``. ``groups_if``: (key, value) without
    which the group keys are ignored. ``bias``: the correction bias [E]. The other fields say what goes into a
    :class:`LayerConfig`.
    """

    model_type: str
    model_class: str
    num_experts: Key
    intermediate_size: Key
    router: str
    experts: MlpNames
    top_k: Key = Key(("num_experts_per_tok",))
    hidden_size: Key = Key(("hidden_size",))
    activation: Key = Key(("hidden_act",), "silu")
    layers: LayerPattern = LayerPattern()
    scoring: Literal["softmax", "sigmoid"] = "softmax"
    renormalize: Key = Key(("norm_topk_prob",), False)
    num_expert_group: Key = Key(default=1)
    topk_group: Key = Key(default=1)
    groups_if: tuple[str, str] | None = None
    group_score: Literal["max", "top2_sum"] = "max"
    routed_scaling_factor: Key = Key(default=1.0)
    logits_dtype: Literal["model", "float32"] = "model"
    bias: str | None = None
    shared: SharedSchema | None = None
    rules: tuple[Rule, ...] = ()
