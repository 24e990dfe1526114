"""Nemotron-H: the router of DeepSeek-V3, and experts without a gate or in a latent space."""

from xpar.engine.architectures.config_key import Key
from xpar.engine.architectures.schema import (
    ActivationSchema,
    Architecture,
    BlockSchema,
    LatentSchema,
    LayerPattern,
    MlpNames,
    Rule,
    SharedSchema,
)
from xpar.engine.architectures.synthetic_schema import SyntheticSchema

_MIXER = "backbone.layers.{layer}.mixer"

NEMOTRON_H = Architecture(
    model_type="nemotron_h",
    model_class="NemotronHForCausalLM",
    num_experts=Key(("n_routed_experts", "num_local_experts")),
    intermediate_size=Key(("moe_intermediate_size",)),
    gate=_MIXER + ".gate.weight",
    correction_bias=_MIXER + ".gate.e_score_correction_bias",
    experts=MlpNames(
        None, _MIXER + ".experts.{expert}.up_proj.weight", _MIXER + ".experts.{expert}.down_proj.weight"
    ),
    activation=ActivationSchema(Key(("mlp_hidden_act",), "relu2")),
    layers=LayerPattern(
        kinds=("layers_block_type", "layer_types", "hybrid_override_pattern"),
        moe_kinds=("moe", "E"),
        kinds_required=True,
    ),
    scoring=Key(default="sigmoid"),
    renormalize=Key(("norm_topk_prob",), True),
    num_expert_group=Key(("n_group",), 1),
    topk_group=Key(("topk_group",), 1),
    group_score="top2_sum",
    routed_scaling_factor=Key(("routed_scaling_factor",), 1.0),
    logits_dtype="float32",
    gate_dtype="float32",
    shared=SharedSchema(
        width=Key(("moe_shared_expert_intermediate_size",)),
        count=Key(default=1),
        names=MlpNames(
            None, _MIXER + ".shared_experts.up_proj.weight", _MIXER + ".shared_experts.down_proj.weight"
        ),
    ),
    latent=LatentSchema(
        Key(("moe_latent_size",), 0), _MIXER + ".fc1_latent_proj.weight", _MIXER + ".fc2_latent_proj.weight"
    ),
    renamings=(("backbone.layers.", "model.layers."),),
    rules=(Rule("mlp_bias", (False,), "biases of its MLPs are not read"),),
    block=BlockSchema("model.layers.{layer}.mixer"),
    synthetic=SyntheticSchema(
        config={"ssm_state_size": 8, "mamba_num_heads": 2, "mamba_head_dim": 16, "n_groups": 1},
        needs_head_dim=True,
    ),
)
