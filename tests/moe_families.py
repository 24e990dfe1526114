"""Small checkpoints of every known family, and transformers' own module for a layer of one."""

import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from xpar.engine.make_checkpoint import make_checkpoint

SIZES = {"layers": 3, "experts": 8, "hidden": 64, "intermediate": 48, "top_k": 3}


def fresh_seed() -> int:
    return random.SystemRandom().randrange(10**6)


@dataclass(frozen=True)
class Case:
    name: str
    model_type: str
    overrides: Mapping[str, Any] = field(default_factory=dict)
    layer: int = 1

    def write(self, path: Path, writer: str, dtype: torch.dtype, seed: int, **sizes: Any) -> None:
        make_checkpoint(
            self.model_type,
            path,
            **{**SIZES, **sizes},
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
)
ONE_PER_FAMILY = tuple({case.model_type: case for case in CASES}.values())


def transformers_block(path: Path, layer: int, dtype: torch.dtype) -> torch.nn.Module:
    """The MoE module of a layer, loaded by transformers, which must find every tensor it wants and no other."""
    model, report = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, output_loading_info=True)
    assert not any(report.values()), report
    return model.model.layers[layer].mlp
