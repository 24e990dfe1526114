"""Families that store all experts of a layer in one tensor."""

from dataclasses import replace

from xpar.engine.architectures.schema import (
    ActivationSchema,
    Architecture,
    Key,
    LayerPattern,
    MlpNames,
    Rule,
    SharedSchema,
)
from xpar.engine.architectures.tensor_names import BLOCK, LAYER, MIXTRAL_BLOCK, mlp

GPT_OSS = Architecture(
    model_type="gpt_oss",
    model_class="GptOssForCausalLM",
    num_experts=Key(("num_local_experts",)),
    intermediate_size=Key(("intermediate_size",)),
    top_k=Key(("num_experts_per_tok", "experts_per_token")),
    router=BLOCK + ".router.weight",
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
)

GRANITEMOE = Architecture(
    model_type="granitemoe",
    model_class="GraniteMoeForCausalLM",
    num_experts=Key(("num_local_experts",)),
    intermediate_size=Key(("intermediate_size",)),
    router=MIXTRAL_BLOCK + ".router.layer.weight",
    experts=MlpNames(
        None,
        None,
        MIXTRAL_BLOCK + ".output_linear.weight",
        gate_up=MIXTRAL_BLOCK + ".input_linear.weight",
        storage="stacked",
    ),
    renamings=(
        (".block_sparse_moe.input_linear.weight", ".block_sparse_moe.experts.gate_up_proj"),
        (".block_sparse_moe.output_linear.weight", ".block_sparse_moe.experts.down_proj"),
        (".router.layer.weight", ".router.weight"),
    ),
    choice="logits",
    renormalize=Key(default=False),
)

GRANITEMOESHARED = replace(
    GRANITEMOE,
    model_type="granitemoeshared",
    model_class="GraniteMoeSharedForCausalLM",
    shared=SharedSchema(
        width=Key(("shared_intermediate_size",), 1024),
        count=Key(default=1),
        names=MlpNames(
            None,
            None,
            LAYER + ".shared_mlp.output_linear.weight",
            gate_up=LAYER + ".shared_mlp.input_linear.weight",
        ),
    ),
)

JETMOE = replace(
    GRANITEMOE,
    model_type="jetmoe",
    model_class="JetMoeForCausalLM",
    router=BLOCK + ".router.layer.weight",
    output_bias=BLOCK + ".bias",
    experts=replace(
        GRANITEMOE.experts, down=BLOCK + ".output_linear.weight", gate_up=BLOCK + ".input_linear.weight"
    ),
    activation=ActivationSchema(Key(("activation_function",), "silu")),
)

_FEED_FORWARD = LAYER + ".feed_forward"

LLAMA4 = Architecture(
    model_type="llama4_text",
    model_class="Llama4ForCausalLM",
    num_experts=Key(("num_local_experts",)),
    intermediate_size=Key(("intermediate_size",)),
    router=_FEED_FORWARD + ".router.weight",
    experts=MlpNames(
        None,
        None,
        _FEED_FORWARD + ".experts.down_proj",
        gate_up=_FEED_FORWARD + ".experts.gate_up_proj",
        storage="stacked",
        up_transposed=True,
        down_transposed=True,
    ),
    top_k=Key(("num_experts_per_tok",), 1),
    layers=LayerPattern(
        step=Key(("interleave_moe_layer_step",), 1), step_offset=1, moe_list=Key(("moe_layers",), ())
    ),
    choice="logits",
    scoring=Key(default="sigmoid"),
    renormalize=Key(default=False),
    weight_on_input=True,
    shared=SharedSchema(
        width=Key(("intermediate_size",)), count=Key(default=1), names=mlp(_FEED_FORWARD + ".shared_expert")
    ),
)

_FFN = "transformer.blocks.{layer}.ffn"

DBRX = Architecture(
    model_type="dbrx",
    model_class="DbrxForCausalLM",
    num_experts=Key(("ffn_config.moe_num_experts",), 4),
    intermediate_size=Key(("ffn_config.ffn_hidden_size",), 3584),
    hidden_size=Key(("d_model",)),
    top_k=Key(("ffn_config.moe_top_k",), 1),
    router=_FFN + ".router.layer.weight",
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
            null=False,
        ),
    ),
)
