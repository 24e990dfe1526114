"""The data of a model family: config keys, tensor names, and the layers that they describe.

If a ``config.json`` leaves a key out, the default is that of the family's configuration class in
transformers.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from xpar.engine.architectures.config_key import Key, lookup
from xpar.engine.architectures.synthetic_schema import SyntheticSchema
from xpar.engine.config import TINY, Choice

Storage = Literal["single", "stacked", "rows"]
Renaming = tuple[str, str]
"""(A part of a tensor's name, its replacement in checkpoints that another tool wrote)."""


@dataclass(frozen=True)
class LayerPattern:
    """The rule that says which layers of a model are MoE layers.

    Layer i is one if ``first_dense <= i <= last`` and ``(i + step_offset) % step == remainder``, unless
    ``dense_list`` contains i. ``last`` = -1 stands for the last layer of the model.

    Two keys of a config replace the rule: ``moe_list`` lists the MoE layers; ``kinds`` are names of a list,
    or string of letters, with the kind of every layer, and MoE layers have one of ``moe_kinds``. With
    ``kinds_required`` a config must have such a list.
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


@dataclass(frozen=True)
class MlpNames:
    """The names of the tensors of one MLP, or of all experts, and their form.

    ``gate`` and ``up`` are [I, H] and ``down`` is [H, I]. ``gate_up`` [2I, H] stands in place of the first
    two: the gate rows first or, if ``interleaved``, gate and up rows in turn. An MLP without a gate has
    ``up`` and ``down`` alone. Biases have the order of ``gate_up``.

    ``storage``: ``single``, one tensor for each MLP; ``stacked``, one for all experts, with E as its first
    dimension; ``rows``, one for all experts, [E I, H], with one expert's rows below the other's.
    ``up_transposed``, ``down_transposed``: the tensors are stored as [in, out].
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
    def is_gated(self) -> bool:
        """Return whether the MLP has a gate."""
        return self.gate is not None or self.gate_up is not None


@dataclass(frozen=True)
class SharedSchema:
    """The shared experts, stored as one MLP of width ``count * width``.

    ``gate``: the tensor [1, H] of a sigmoid gate on the shared output. ``combination``: ``sum`` of routed and
    shared output, or their ``average``.
    """

    width: Key
    count: Key
    names: MlpNames
    gate: str | None = None
    combination: Key = Key(default="sum")


@dataclass(frozen=True)
class LatentSchema:
    """The tensors ``enter`` [L, H] and ``leave`` [H, L] around the routed experts.

    A config without ``size`` L has neither.
    """

    size: Key
    enter: str
    leave: str


@dataclass(frozen=True)
class NormSchema:
    """The RMS norms inside a layer, before the gate and before the routed experts.

    ``gate_scale``, ``experts_scale``: tensors [H] that multiply normalised tokens. Those of the gate are
    multiplied by ``H ** -0.5``, too.
    """

    epsilon: Key
    gate_scale: str
    experts_scale: str


@dataclass(frozen=True)
class HashSchema:
    """The layers that route by token id, without a correction bias.

    ``table``: the tensor [vocabulary, k] of expert ids by token id. ``kinds``: names of a config's list of
    the kind of every layer, which is ``kind`` for these layers. Without such a list they are the first
    ``count``.
    """

    table: str
    vocabulary: Key
    kinds: tuple[str, ...]
    kind: str
    count: Key

    def applies_to(self, config: Mapping[str, Any], layer: int) -> bool:
        """Return whether ``layer`` routes by token id."""
        kinds = next((v for name in self.kinds if (v := lookup(config, name)) is not None), None)
        if kinds is not None:
            return bool(kinds[layer] == self.kind)
        return bool(layer < self.count.get(config, int))


@dataclass(frozen=True)
class Rule:
    """A config key that must be absent or have an ``allowed`` value, for the reason ``why``.

    Null counts as absent if ``allows_null``.
    """

    key: str
    allowed: tuple[object, ...]
    why: str
    allows_null: bool = True


@dataclass(frozen=True)
class ActivationSchema:
    """The activation of the experts: its name, its bound and its parameters."""

    name: Key = Key(("hidden_act",), "silu")
    limit: Key | None = None
    alpha: Key = Key(default=1.0)
    beta: Key = Key(default=0.0)


@dataclass(frozen=True)
class BlockSchema:
    """The module of transformers' model that is the whole MoE block of a layer.

    ``returns_pair``: its forward returns a second value. ``beside``: a module whose output the model adds to
    the block's, and which is a part of xpar's layer.
    """

    path: str = "model.layers.{layer}.mlp"
    returns_pair: bool = False
    beside: str | None = None


@dataclass(frozen=True)
class Architecture:
    """A model family.

    Names of tensors are templates with ``{layer}`` and, for experts, ``{expert}``. The fields that are not
    explained here make the :class:`~xpar.engine.config.LayerConfig`.

    Args:
        model_type: the family's name in ``config.json``.
        model_class: its entry in the ``architectures`` list of ``config.json``.
        gate: the router's weight [E, H].
        gate_bias: the bias [E] of the logits.
        gate_dtype: ``float32`` for a gate that stays float32 whatever the model's dtype.
        correction_bias: the bias [E] of the scores, stored as [1, E] with ``correction_bias_is_row``.
        expert_scale: a factor [E] of each expert's weight.
        output_bias: a bias [H] of the layer's output.
        groups_if: (key, value) without which the keys of groups are ignored.
        hash_routing: layers that route by token id.
        renamings: other spellings of the names, any of which a checkpoint may have; see
            :mod:`xpar.engine.architectures.stored_names`.
        rules: what a config must say, because nothing else is implemented.
        block: the module that xpar's layer replaces in a whole model.
        why_layers_only: why no whole model can be made, only its layers; None if it can.
        synthetic: what the writers of random checkpoints need; None if none can be written.
    """

    model_type: str
    model_class: str
    num_experts: Key
    intermediate_size: Key
    gate: str
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
    gate_bias: str | None = None
    correction_bias: str | None = None
    correction_bias_is_row: bool = False
    expert_scale: str | None = None
    output_bias: str | None = None
    shared: SharedSchema | None = None
    latent: LatentSchema | None = None
    hash_routing: HashSchema | None = None
    norm: NormSchema | None = None
    renamings: tuple[Renaming, ...] = ()
    rules: tuple[Rule, ...] = ()
    block: BlockSchema = BlockSchema()
    why_layers_only: str | None = None
    synthetic: SyntheticSchema | None = None
