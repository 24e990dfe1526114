"""Tensor names and patterns of layers that several families have in common."""

from xpar.engine.architectures.config_key import Key
from xpar.engine.architectures.schema import LayerPattern, MlpNames, SharedSchema


def mlp_names(prefix: str, gate: str = "gate_proj", up: str = "up_proj", down: str = "down_proj") -> MlpNames:
    """Name the three tensors of a gated MLP below ``prefix``."""
    return MlpNames(f"{prefix}.{gate}.weight", f"{prefix}.{up}.weight", f"{prefix}.{down}.weight")


LAYER = "model.layers.{layer}"
BLOCK = LAYER + ".mlp"
EXPERTS = mlp_names(BLOCK + ".experts.{expert}")
FEED_FORWARD = LAYER + ".feed_forward"

MIXTRAL_BLOCK = LAYER + ".block_sparse_moe"
MIXTRAL_EXPERTS = mlp_names(MIXTRAL_BLOCK + ".experts.{expert}", gate="w1", up="w3", down="w2")
MIXTRAL_RENAMINGS = ((".block_sparse_moe.", ".mlp."),)
"""Names of transformers 5's own modules."""

DEEPSEEK_SHARED = SharedSchema(
    width=Key(("moe_intermediate_size",)),
    count=Key(("n_shared_experts",), 0),
    names=mlp_names(BLOCK + ".shared_experts"),
)
QWEN_LAYERS = LayerPattern(
    step=Key(("decoder_sparse_step",), 1), step_offset=1, dense_list=Key(("mlp_only_layers",), ())
)
QWEN_SHARED = SharedSchema(
    width=Key(("shared_expert_intermediate_size",)),
    count=Key(default=1),
    names=mlp_names(BLOCK + ".shared_expert"),
    gate=BLOCK + ".shared_expert_gate.weight",
)
