"""DeepSeek-V4, whose first layers route by token id."""

from xpar.engine.architectures.config_key import Key
from xpar.engine.architectures.schema import ActivationSchema, Architecture, HashSchema, Rule, SharedSchema
from xpar.engine.architectures.synthetic_schema import SyntheticSchema
from xpar.engine.architectures.tensor_names import LAYER, mlp_names

_FFN = LAYER + ".ffn"

DEEPSEEK_V4 = Architecture(
    model_type="deepseek_v4",
    model_class="DeepseekV4ForCausalLM",
    num_experts=Key(("n_routed_experts", "num_local_experts")),
    intermediate_size=Key(("moe_intermediate_size",)),
    gate=_FFN + ".gate.weight",
    correction_bias=_FFN + ".gate.bias",
    hash_routing=HashSchema(
        _FFN + ".gate.tid2eid",
        Key(("vocab_size",)),
        ("mlp_layer_types",),
        "hash_moe",
        Key(("num_hash_layers",), 3),
    ),
    experts=mlp_names(_FFN + ".experts.{expert}", gate="w1", up="w3", down="w2"),
    activation=ActivationSchema(limit=Key(("swiglu_limit",), 10.0)),
    scoring=Key(default="sqrtsoftplus"),
    renormalize=Key(default=True),
    routed_scaling_factor=Key(("routed_scaling_factor",), 1.5),
    shared=SharedSchema(
        width=Key(("moe_intermediate_size",)),
        count=Key(("n_shared_experts",), 1),
        names=mlp_names(_FFN + ".shared_experts", gate="w1", up="w3", down="w2"),
    ),
    renamings=(
        (".ffn.", ".mlp."),
        (".gate.bias", ".gate.e_score_correction_bias"),
        (".shared_experts.w1.", ".shared_experts.gate_proj."),
        (".shared_experts.w2.", ".shared_experts.down_proj."),
        (".shared_experts.w3.", ".shared_experts.up_proj."),
    ),
    rules=(
        Rule("scoring_func", ("sqrtsoftplus",), "the family scores with the root of softplus"),
        Rule("norm_topk_prob", (True,), "the family renormalises"),
        Rule("n_shared_experts", (1,), "the family's models have one"),
        Rule("hidden_act", ("silu",), "the family's activation is a bounded silu"),
        Rule("mlp_bias", (False,), "biases of its MLPs are not read"),
    ),
    why_layers_only=(
        "its checkpoints name dense weights as transformers does not, and its blocks are not given token ids"
    ),
    synthetic=SyntheticSchema(
        config={
            "num_key_value_heads": 1,
            "q_lora_rank": 32,
            "o_groups": 2,
            "o_lora_rank": 16,
            "index_n_heads": 2,
            "index_head_dim": 16,
            "hc_mult": 2,
            "partial_rotary_factor": 0.5,
            "num_hash_layers": 1,
        },
        needs_head_dim=True,
        dense_key=None,
        ones=(".scale", "_scale"),
    ),
)
