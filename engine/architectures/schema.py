"""What a model family is made of, as data: config keys, tensor names, and the router they describe.

Where a ``config.json`` leaves a key out, the default is that of the family's own configuration class in transformers.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from xpar.engine.checkpoint.tensor_file import CheckpointError
from xpar.engine.config import TINY, Choice


@dataclass(frozen=True)
class Key:
    """A value of ``config.json``: the first of ``names`` that is there and not null, else ``default``.

    ``a.b`` is key b of the object a. No names make it a constant of the family; no default makes it required.
    """

    names: tuple[str, ...] = ()
    default: Any = None

    def get(self, config: Mapping[str, Any], kind: type, layer: int = 0) -> Any:
        """The value, checked to be a ``kind`` (int, float, bool, str or list); of a list of them, that of ``layer``."""
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
    """``config[name]``, or None; ``a.b`` looks into the object ``a``."""
    value: Any = config
    for part in name.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def present(config: Mapping[str, Any], name: str) -> bool:
    """Whether ``config`` has the key ``name`` at all, be it null."""
    *path, last = name.split(".")
    inner = lookup(config, ".".join(path)) if path else config
    return isinstance(inner, Mapping) and last in inner


@dataclass(frozen=True)
class LayerPattern:
    """Layer i is MoE if ``first_dense <= i <= last``, ``(i + step_offset) % step == remainder``, not in ``dense_list``.

    ``last``: -1 for the last one there is. ``moe_list``, where the config has it, lists the MoE layers instead; or
    ``kinds``, keys of a list, or string of letters, of every layer's kind, of which ``moe_kinds`` are MoE. Where
    ``kinds_required``, a config must have that.
    """

    count: Key = Key(("num_hidden_layers",))
    first_dense: Key = Key(default=0)
    last: Key = Key(default=-1)
    step: Key = Key(default=1)
    step_offset: int = 0
    remainder: Key = Key(default=0)
    dense_list: Key = Key(default=())
    moe_list: Key = Key(default=())
    kinds: tuple[str, ...] = ()
    moe_kinds: tuple[str, ...] = ()
    kinds_required: bool = False


Storage = Literal["single", "stacked", "rows"]
Renaming = tuple[str, str]
"""(A part of a tensor's name, what other tools that write checkpoints of the family have in its place)."""


@dataclass(frozen=True)
class MlpNames:
    """The tensors of one MLP, or of all experts, and how they are stored.

    ``gate`` and ``up`` [I, H], or in their place ``gate_up`` [2I, H], the gate rows first or, if ``interleaved``, gate
    and up rows in turn; ``down`` [H, I]. An MLP without a gate has ``up`` and ``down``. Biases, if any, have the
    order of ``gate_up``. ``storage``: ``single``, a tensor for each MLP; ``stacked``, one for all experts, with E as
    its first dimension; ``rows``, one for all experts, [E I, H], one expert's rows below the other's.
    ``up_transposed``, ``down_transposed``: stored as [in, out].
    """

    gate: str | None
    up: str | None
    down: str
    gate_up: str | None = None
    gate_up_bias: str | None = None
    down_bias: str | None = None
    storage: Storage = "single"
    interleaved: bool = False
    up_transposed: bool = False
    down_transposed: bool = False

    @property
    def gated(self) -> bool:
        return self.gate is not None or self.gate_up is not None


@dataclass(frozen=True)
class SharedSchema:
    """Shared experts, stored as one MLP of width ``count * width``; ``gate``: tensor [1, H] of their sigmoid gate.

    ``combination``: ``average`` makes the layer's output the mean of the routed and the shared one, not their sum.
    """

    width: Key
    count: Key
    names: MlpNames
    gate: str | None = None
    combination: Key = Key(default="sum")


@dataclass(frozen=True)
class LatentSchema:
    """Tensors ``enter`` [L, H] and ``leave`` [H, L] around the routed experts; a config without ``size`` L has none."""

    size: Key
    enter: str
    leave: str


@dataclass(frozen=True)
class NormSchema:
    """Norms inside the layer: the gate and the routed experts read tokens over their root mean square.

    ``gate_scale``, ``experts_scale``: tensors [H] that multiply those then; the gate's also by ``H ** -0.5``.
    """

    epsilon: Key
    gate_scale: str
    experts_scale: str


@dataclass(frozen=True)
class HashSchema:
    """Layers whose experts a table [vocabulary, k] of integers names by token id; they have no correction bias.

    ``kinds``, keys of a list of every layer's kind, say which by ``kind``; without such a list the first ``count`` are.
    """

    table: str
    vocabulary: Key
    kinds: tuple[str, ...]
    kind: str
    count: Key

    def holds(self, config: Mapping[str, Any], layer: int) -> bool:
        """Whether ``layer`` is one."""
        kinds = next((v for name in self.kinds if (v := lookup(config, name)) is not None), None)
        if kinds is not None:
            return bool(kinds[layer] == self.kind)
        return bool(layer < self.count.get(config, int))


@dataclass(frozen=True)
class Rule:
    """A config key that, when present, must have one of the ``allowed`` values; null is one unless ``null`` is false."""

    key: str
    allowed: tuple[object, ...]
    why: str
    null: bool = True


@dataclass(frozen=True)
class ActivationSchema:
    """The experts' activation: its name, and the bounds and parameters of those that have them."""

    name: Key = Key(("hidden_act",), "silu")
    limit: Key | None = None
    alpha: Key = Key(default=1.0)
    beta: Key = Key(default=0.0)


@dataclass(frozen=True)
class Architecture:
    """A model family. Tensor names are templates with ``{layer}`` and, for experts, ``{expert}``.

    ``model_class``: its entry in the ``architectures`` list of ``config.json``. ``groups_if``: (key, value) without
    which the group keys are ignored. ``gate_dtype``: ``float32`` for a gate that stays float32 whatever the
    model's dtype. ``bias``: the correction bias [E], stored as [1, E] if ``bias_is_row``; ``gate_bias``: the bias [E] of
    the logits; ``output_bias``: a bias [H] of the layer's output; ``hashed``: layers that route by token id; ``expert_scale``: a
    factor [E] of each expert's weight. ``renamings``: other spellings of the names, any of which a checkpoint may
    have (:mod:`xpar.engine.architectures.stored_names`). The other fields say what goes into a :class:`LayerConfig`.
    """

    model_type: str
    model_class: str
    num_experts: Key
    intermediate_size: Key
    router: str
    experts: MlpNames
    top_k: Key = Key(("num_experts_per_tok",))
    hidden_size: Key = Key(("hidden_size",))
    activation: ActivationSchema = ActivationSchema()
    layers: LayerPattern = LayerPattern()
    choice: Choice = "scores"
    scoring: Key = Key(default="softmax")
    renormalize: Key = Key(("norm_topk_prob",), False)
    renormalize_min: Key = Key(default=TINY)
    num_expert_group: Key = Key(default=1)
    topk_group: Key = Key(default=1)
    groups_if: tuple[str, str] | None = None
    group_score: Literal["max", "top2_sum"] = "max"
    routed_scaling_factor: Key = Key(default=1.0)
    logits_dtype: Literal["model", "float32"] = "model"
    weight_on_input: bool = False
    zero_experts: Key = Key(default=0)
    jitter_eps: Key = Key(default=0.01)
    gate_dtype: Literal["model", "float32"] = "model"
    bias: str | None = None
    bias_is_row: bool = False
    gate_bias: str | None = None
    output_bias: str | None = None
    shared: SharedSchema | None = None
    latent: LatentSchema | None = None
    hashed: HashSchema | None = None
    expert_scale: str | None = None
    norm: NormSchema | None = None
    renamings: tuple[Renaming, ...] = ()
    rules: tuple[Rule, ...] = ()
