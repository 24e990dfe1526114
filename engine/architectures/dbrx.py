"""DBRX: nested config keys, and tensors that have the rows of one expert below the other."""

from xpar.engine.architectures.config_key import Key
from xpar.engine.architectures.schema import (
    ActivationSchema,
    Architecture,
    BlockSchema,
    LayerPattern,
    MlpNames,
    Rule,
)
from xpar.engine.architectures.synthetic_schema import SyntheticSchema

_FFN = "transformer.blocks.{layer}.ffn"

DBRX = Architecture(
    model_type="dbrx",
    model_class="DbrxForCausalLM",
    num_experts=Key(("ffn_config.moe_num_experts",), 4),
    intermediate_size=Key(("ffn_config.ffn_hidden_size",), 3584),
    hidden_size=Key(("d_model",)),
    top_k=Key(("ffn_config.moe_top_k",), 1),
    gate=_FFN + ".router.layer.weight",
    experts=MlpNames(
        _FFN + ".experts.mlp.w1",
        _FFN + ".experts.mlp.v1",
        _FFN + ".experts.mlp.w2",
        storage="rows",
        down_transposed=True,
    ),
    activation=ActivationSchema(Key(("ffn_config.ffn_act_fn.name",), "silu")),
    layers=LayerPattern(count=Key(("n_layers",))),
    renormalize=Key(default=True),
    rules=(
        Rule(
            "ffn_config.moe_normalize_expert_weights",
            (1, 1.0),
            "weights are divided by their sum, which is the norm of order 1",
            allows_null=False,
        ),
    ),
    block=BlockSchema(_FFN),
    synthetic=SyntheticSchema(
        config={"attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0}},
        ones=("norm_1.weight", "norm_2.weight"),
        strong=(".w2",),
    ),
)
