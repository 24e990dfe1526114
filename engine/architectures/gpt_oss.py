"""gpt-oss: experts stacked in one tensor, with biases, gate and up rows in turn."""

from xpar.engine.architectures.config_key import Key
from xpar.engine.architectures.schema import ActivationSchema, Architecture, BlockSchema, MlpNames, Rule
from xpar.engine.architectures.synthetic_schema import GROUPED_QUERY, QKV_BIAS, SyntheticSchema
from xpar.engine.architectures.tensor_names import BLOCK

GPT_OSS = Architecture(
    model_type="gpt_oss",
    model_class="GptOssForCausalLM",
    num_experts=Key(("num_local_experts",)),
    intermediate_size=Key(("intermediate_size",)),
    top_k=Key(("num_experts_per_tok", "experts_per_token")),
    gate=BLOCK + ".router.weight",
    gate_bias=BLOCK + ".router.bias",
    experts=MlpNames(
        None,
        None,
        BLOCK + ".experts.down_proj",
        gate_up=BLOCK + ".experts.gate_up_proj",
        gate_up_bias=BLOCK + ".experts.gate_up_proj_bias",
        down_bias=BLOCK + ".experts.down_proj_bias",
        storage="stacked",
        interleaved=True,
        up_transposed=True,
        down_transposed=True,
    ),
    activation=ActivationSchema(
        limit=Key(("swiglu_limit",), 7.0), alpha=Key(("swiglu_alpha",), 1.702), beta=Key(default=1.0)
    ),
    choice="logits",
    renormalize=Key(default=False),
    rules=(Rule("hidden_act", ("silu",), "the family's activation is a bounded silu"),),
    block=BlockSchema(returns_pair=True),
    synthetic=SyntheticSchema(
        {
            **GROUPED_QUERY,
            **QKV_BIAS,
            "self_attn.o_proj.bias": ("hidden",),
            "self_attn.sinks": ("heads",),
        },
        needs_head_dim=True,
    ),
)
