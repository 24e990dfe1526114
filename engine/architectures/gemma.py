"""Gemma-4's mixture-of-experts layers: the tokens given to one are the residual, and its norms are inside."""

from xpar.engine.architectures.nested import part_of
from xpar.engine.architectures.schema import ActivationSchema, Architecture, Key, MlpNames, NormSchema, Rule


def gemma4(model_type: str, model_class: str, layer: str) -> Architecture:
    """The family whose tensors of one layer begin with ``layer``."""
    return Architecture(
        model_type=model_type,
        model_class=model_class,
        num_experts=Key(("num_experts",)),
        intermediate_size=Key(("moe_intermediate_size",)),
        top_k=Key(("top_k_experts",)),
        router=layer + ".router.proj.weight",
        gate_dtype="float32",
        logits_dtype="float32",
        expert_scale=layer + ".router.per_expert_scale",
        norm=NormSchema(
            Key(("rms_norm_eps",), 1e-6),
            layer + ".router.scale",
            layer + ".pre_feedforward_layernorm_2.weight",
        ),
        experts=MlpNames(
            None,
            None,
            layer + ".experts.down_proj",
            gate_up=layer + ".experts.gate_up_proj",
            storage="stacked",
        ),
        activation=ActivationSchema(Key(("hidden_activation",), "gelu_pytorch_tanh")),
        renormalize=Key(default=True),
        rules=(
            Rule("enable_moe_block", (True,), "the dense models of the family have no experts", null=False),
        ),
    )


GEMMA4_TEXT = gemma4("gemma4_text", "Gemma4ForCausalLM", "model.layers.{layer}")
GEMMA4 = part_of(
    gemma4("gemma4", "Gemma4ForConditionalGeneration", "model.language_model.layers.{layer}"),
    "gemma4",
    "Gemma4ForConditionalGeneration",
    config="text_config",
    tensors="",
)
