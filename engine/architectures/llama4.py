"""Llama-4, by itself (``llama4_text``) and with its vision part (``llama4``)."""

from xpar.engine.architectures.config_key import Key
from xpar.engine.architectures.nested import part_of
from xpar.engine.architectures.schema import Architecture, BlockSchema, LayerPattern, MlpNames, SharedSchema
from xpar.engine.architectures.synthetic_schema import DENSE_MLP, GROUPED_QUERY, SyntheticSchema
from xpar.engine.architectures.tensor_names import FEED_FORWARD, mlp_names

LLAMA4_TEXT = Architecture(
    model_type="llama4_text",
    model_class="Llama4ForCausalLM",
    num_experts=Key(("num_local_experts",)),
    intermediate_size=Key(("intermediate_size",)),
    gate=FEED_FORWARD + ".router.weight",
    experts=MlpNames(
        None,
        None,
        FEED_FORWARD + ".experts.down_proj",
        gate_up=FEED_FORWARD + ".experts.gate_up_proj",
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
        width=Key(("intermediate_size",)),
        count=Key(default=1),
        names=mlp_names(FEED_FORWARD + ".shared_expert"),
    ),
    block=BlockSchema(FEED_FORWARD, returns_pair=True),
    synthetic=SyntheticSchema(
        GROUPED_QUERY,
        {"intermediate_size_mlp": 128},
        needs_head_dim=True,
        mlp={name.replace("mlp.", "feed_forward."): shape for name, shape in DENSE_MLP.items()},
        dense_key="intermediate_size_mlp",
    ),
)

LLAMA4 = part_of(
    LLAMA4_TEXT,
    "llama4",
    "Llama4ForConditionalGeneration",
    config="text_config",
    tensors="language_model.",
)
