"""What several families share: tensor names and patterns of layers."""

from xpar.engine.architectures.schema import Key, LayerPattern, MlpNames, SharedSchema


def mlp(prefix: str, gate: str = "gate_proj", up: str = "up_proj", down: str = "down_proj") -> MlpNames:
    """A gated MLP of three tensors below ``prefix``."""
    return MlpNames(f"{prefix}.{gate}.weight", f"{prefix}.{up}.weight", f"{prefix}.{down}.weight")


LAYER = "model.layers.{layer}"
BLOCK = LAYER + ".mlp"
EXPERTS = mlp(BLOCK + ".experts.{expert}")
MIXTRAL_BLOCK = LAYER + ".block_sparse_moe"
MIXTRAL_EXPERTS = mlp(MIXTRAL_BLOCK + ".experts.{expert}", gate="w1", up="w3", down="w2")
MIXTRAL_RENAMINGS = ((".block_sparse_moe.", ".mlp."),)
"""transformers 5 names its own modules so."""

DEEPSEEK_SHARED = SharedSchema(
    width=Key(("moe_intermediate_size",)),
    count=Key(("n_shared_experts",), 0),
    names=mlp(BLOCK + ".shared_experts"),
)
QWEN_LAYERS = LayerPattern(
    step=Key(("decoder_sparse_step",), 1), step_offset=1, dense_list=Key(("mlp_only_layers",), ())
)
