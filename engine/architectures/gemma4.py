"""Gemma-4, by itself (``gemma4_text``) and with its other parts (``gemma4``).

Its MoE layer reads the residual, through norms that are inside the layer.
"""

from xpar.engine.architectures.config_key import Key
from xpar.engine.architectures.nested import part_of
from xpar.engine.architectures.schema import ActivationSchema, Architecture, MlpNames, NormSchema, Rule
from xpar.engine.architectures.synthetic_schema import SyntheticSchema
from xpar.engine.architectures.tensor_names import LAYER

GEMMA4_TEXT = Architecture(
    model_type="gemma4_text",
    model_class="Gemma4ForCausalLM",
    num_experts=Key(("num_experts",)),
    intermediate_size=Key(("moe_intermediate_size",)),
    top_k=Key(("top_k_experts",)),
    gate=LAYER + ".router.proj.weight",
    gate_dtype="float32",
    logits_dtype="float32",
    expert_scale=LAYER + ".router.per_expert_scale",
    norm=NormSchema(
        Key(("rms_norm_eps",), 1e-6),
        LAYER + ".router.scale",
        LAYER + ".pre_feedforward_layernorm_2.weight",
    ),
    experts=MlpNames(
        None,
        None,
        LAYER + ".experts.down_proj",
        gate_up=LAYER + ".experts.gate_up_proj",
        storage="stacked",
    ),
    activation=ActivationSchema(Key(("hidden_activation",), "gelu_pytorch_tanh")),
    renormalize=Key(default=True),
    rules=(
        Rule(
            "enable_moe_block", (True,), "the dense models of the family have no experts", allows_null=False
        ),
    ),
    synthetic=SyntheticSchema(
        config={"enable_moe_block": True, "hidden_size_per_layer_input": 0},
        needs_head_dim=True,
        ones=("norm_1.weight", "norm_2.weight", ".scale", "_scale", "layer_scalar"),
    ),
)

GEMMA4 = part_of(
    GEMMA4_TEXT,
    "gemma4",
    "Gemma4ForConditionalGeneration",
    config="text_config",
    tensors="model.language_model.",
    in_place_of="model.",
)
