"""Small checkpoints of every known family, and transformers' own module for a layer of one."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from xpar.engine.architectures.layer_config import find
from xpar.engine.architectures.schema import Architecture
from xpar.engine.synthetic.checkpoint import make_checkpoint

SIZES = {"layers": 3, "experts": 8, "hidden": 64, "intermediate": 48, "top_k": 3}


@dataclass(frozen=True)
class Case:
    name: str
    model_type: str
    overrides: Mapping[str, Any] = field(default_factory=dict)
    layer: int = 1
    router: str | None = (
        "gate"  # the submodule that returns (logits, weights, ids) of [T, H], if there is one
    )
    roundings: int = 1  # of a weight in bf16, by transformers

    @property
    def architecture(self) -> Architecture:
        return find({"model_type": self.model_type})

    @property
    def writers(self) -> tuple[str, ...]:
        schema = self.architecture.synthetic
        has_own = schema is not None and schema.attention is not None
        return ("own", "transformers") if has_own else ("transformers",)

    @property
    def top_k(self) -> int:
        """The usual number of experts per token, or the most that the family takes."""
        if self.architecture.weight_on_input:
            return 1
        return 2 if self.architecture.choice == "sparsemixer" else SIZES["top_k"]

    def write(self, path: Path, writer: str, dtype: torch.dtype, seed: int, **sizes: Any) -> None:
        make_checkpoint(
            self.model_type,
            path,
            **{**SIZES, "top_k": self.top_k, **sizes},
            overrides=self.overrides,
            dtype=dtype,
            seed=seed,
            writer=writer,
        )


CASES = (
    Case("mixtral", "mixtral"),
    Case("mixtral-gelu", "mixtral", {"hidden_act": "gelu"}),
    Case("qwen2_moe", "qwen2_moe"),
    Case("qwen2_moe-sparse_step", "qwen2_moe", {"decoder_sparse_step": 2, "norm_topk_prob": True}),
    Case("qwen3_moe", "qwen3_moe", {"hidden_act": "gelu_pytorch_tanh"}),
    Case("qwen3_moe-mlp_only", "qwen3_moe", {"mlp_only_layers": [0], "norm_topk_prob": False}),
    Case("olmoe", "olmoe"),
    Case("olmoe-renormalised", "olmoe", {"norm_topk_prob": True}),
    Case("deepseek_v2-grouped", "deepseek_v2", {"routed_scaling_factor": 1.5, "first_k_dense_replace": 1}),
    Case("deepseek_v2-greedy", "deepseek_v2", {"topk_method": "greedy", "n_shared_experts": 2}),
    Case("deepseek_v3", "deepseek_v3", {"first_k_dense_replace": 1, "n_shared_experts": 2}),
    Case("deepseek_v3-ungrouped", "deepseek_v3", {"n_group": 1, "topk_group": 1, "norm_topk_prob": False}),
    Case("gpt_oss", "gpt_oss", {"swiglu_limit": 1.5}, router="router"),
    Case("glm4_moe", "glm4_moe", {"first_k_dense_replace": 1, "routed_scaling_factor": 1.5}),
    Case("granitemoe", "granitemoe", router="router"),
    Case("granitemoeshared", "granitemoeshared", router="moe.router"),
    Case("deepseek_v4", "deepseek_v4", {"swiglu_limit": 1.5}, router=None),
    Case("llama4", "llama4_text", {"interleave_moe_layer_step": 2}, router=None),
    Case("minimax_m2", "minimax_m2", router=None),
    Case("ernie4_5_moe", "ernie4_5_moe", {"moe_layer_start_index": 1, "moe_num_shared_experts": 2}),
    Case("phimoe", "phimoe", router="router"),
    Case("dots1", "dots1", {"first_k_dense_replace": 1, "norm_topk_prob": True}),
    Case("qwen3_next", "qwen3_next", {"mlp_only_layers": [2]}),
    Case("hunyuan_v1_moe", "hunyuan_v1_moe"),
    Case("jamba", "jamba", {"expert_layer_period": 2, "expert_layer_offset": 1}, router="router"),
    Case("longcat_flash", "longcat_flash", router="router"),
    Case("nemotron_h", "nemotron_h", {"layers_block_type": ["full_attention", "moe", "mlp"]}),
    Case(
        "nemotron_h-latent",
        "nemotron_h",
        {"layers_block_type": ["full_attention", "moe", "mlp"], "moe_latent_size": 40},
    ),
    Case("dbrx", "dbrx", router=None, roundings=2),
    Case("jetmoe", "jetmoe", router=None),
    Case(
        "cohere2_moe-sum",
        "cohere2_moe",
        {"shared_expert_combination_strategy": "sum", "mlp_layer_types": ["dense", "sparse", "sparse"]},
    ),
    Case(
        "cohere2_moe", "cohere2_moe", {"num_shared_experts": 2, "expert_selection_fn": "sigmoid"}, roundings=4
    ),
)
ONE_PER_FAMILY = tuple({case.model_type: case for case in CASES}.values())


def transformers_model(path: Path, dtype: torch.dtype) -> torch.nn.Module:
    """The model, loaded by transformers, which must find every tensor it wants and no other."""
    model, report = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, output_loading_info=True)
    assert not any(report.values()), report
    return model


class Beside(torch.nn.Module):
    """The sum of an MoE module and of what its decoder layer computes beside it."""

    def __init__(self, moe: torch.nn.Module, shared: torch.nn.Module) -> None:
        super().__init__()
        self.moe, self.shared = moe, shared

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.moe(x) + self.shared(x)


def block_of(model: torch.nn.Module, case: Case) -> torch.nn.Module:
    """The MoE module of the case's layer."""
    names = case.architecture.block
    block = model.get_submodule(names.path.format(layer=case.layer))
    if names.beside is None:
        return block
    return Beside(block, model.get_submodule(names.beside.format(layer=case.layer)))


def transformers_block(path: Path, case: Case, dtype: torch.dtype) -> torch.nn.Module:
    """:func:`block_of` the model at ``path``."""
    return block_of(transformers_model(path, dtype), case)


def transformers_output(block: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    """[T, H] of [T, H]; some modules return their routing too."""
    with torch.no_grad():
        output = block(x[None])
    return (output[0] if isinstance(output, tuple) else output).reshape(x.shape)
