"""The configs of published models give the layers that their papers and model cards describe."""

from typing import Any

import pytest
from published_configs import (
    DBRX,
    ERNIE,
    GLM,
    GPT_OSS,
    HUNYUAN,
    JAMBA,
    LONGCAT,
    MAVERICK,
    MIXTRAL,
    NEMOTRON,
    OLMOE,
    PHI,
    QWEN2,
    QWEN3,
    V2,
    V3,
)

from xpar.engine.architectures.layer_config import find, layer_config, moe_layers
from xpar.engine.config import LayerConfig, RouterConfig, SharedConfig
from xpar.kernels.contracts import Activation

V3_ROUTER: dict[str, Any] = {
    "scoring": "sigmoid",
    "group_score": "top2_sum",
    "correction_bias": True,
    "logits_dtype": "float32",
}
LOGITS: dict[str, Any] = {"choice": "logits", "renormalize": False}

PUBLISHED: dict[str, tuple[dict[str, Any], range | tuple[int, ...], LayerConfig]] = {
    "Mixtral 8x7B": (MIXTRAL, range(32), LayerConfig(8, 4096, 14336, RouterConfig(2))),
    "Qwen1.5-MoE-A2.7B": (
        QWEN2,
        range(24),
        LayerConfig(
            60, 2048, 1408, RouterConfig(4, renormalize=False), shared=SharedConfig(5632, gated=True)
        ),
    ),
    "Qwen3-30B-A3B": (QWEN3, range(48), LayerConfig(128, 2048, 768, RouterConfig(8))),
    "OLMoE-1B-7B": (OLMOE, range(16), LayerConfig(64, 2048, 1024, RouterConfig(8, renormalize=False))),
    "DeepSeek-V2": (
        V2,
        range(1, 60),
        LayerConfig(
            160,
            5120,
            1536,
            RouterConfig(
                6,
                renormalize=False,
                num_expert_group=8,
                topk_group=3,
                routed_scaling_factor=16.0,
                logits_dtype="float32",
            ),
            shared=SharedConfig(3072),
        ),
    ),
    "DeepSeek-V3": (
        V3,
        range(3, 61),
        LayerConfig(
            256,
            7168,
            2048,
            RouterConfig(
                8,
                scoring="sigmoid",
                num_expert_group=8,
                topk_group=4,
                group_score="top2_sum",
                correction_bias=True,
                routed_scaling_factor=2.5,
                logits_dtype="float32",
            ),
            shared=SharedConfig(2048),
        ),
    ),
    "gpt-oss-120b": (
        GPT_OSS,
        range(36),
        LayerConfig(
            128,
            2880,
            2880,
            RouterConfig(4, gate_bias=True, **LOGITS),
            Activation("silu", limit=7.0, alpha=1.702, beta=1.0),
            bias=True,
        ),
    ),
    "Llama-4-Maverick": (
        MAVERICK,
        range(1, 48, 2),
        LayerConfig(
            128,
            5120,
            8192,
            RouterConfig(1, scoring="sigmoid", weight_on_input=True, **LOGITS),
            shared=SharedConfig(8192),
        ),
    ),
    "GLM-4.5-Air": (
        GLM,
        range(1, 46),
        LayerConfig(128, 4096, 1408, RouterConfig(8, **V3_ROUTER), shared=SharedConfig(1408)),
    ),
    "Phi-3.5-MoE": (
        PHI,
        range(32),
        LayerConfig(16, 4096, 6400, RouterConfig(2, choice="sparsemixer", renormalize=False)),
    ),
    "ERNIE-4.5-21B-A3B": (
        ERNIE,
        range(1, 28),
        LayerConfig(
            64,
            2560,
            1536,
            RouterConfig(6, correction_bias=True, logits_dtype="float32", renormalize_min=1e-12),
            shared=SharedConfig(3072),
        ),
    ),
    "Hunyuan-A13B": (
        HUNYUAN,
        range(32),
        LayerConfig(64, 4096, 3072, RouterConfig(8, logits_dtype="float32"), shared=SharedConfig(3072)),
    ),
    "Jamba-v0.1": (
        JAMBA,
        range(1, 32, 2),
        LayerConfig(16, 4096, 14336, RouterConfig(2, renormalize=False)),
    ),
    "LongCat-Flash": (
        LONGCAT,
        range(28),
        LayerConfig(
            512,
            6144,
            2048,
            RouterConfig(
                12,
                renormalize=False,
                correction_bias=True,
                routed_scaling_factor=6.0,
                logits_dtype="float32",
                zero_experts=256,
            ),
        ),
    ),
    "Nemotron-3-Nano (six layers)": (
        NEMOTRON,
        (1, 5),
        LayerConfig(
            128,
            2688,
            1856,
            RouterConfig(6, routed_scaling_factor=2.5, **V3_ROUTER),
            Activation("relu2", gated=False),
            shared=SharedConfig(3712),
        ),
    ),
    "DBRX": (DBRX, range(40), LayerConfig(16, 6144, 10752, RouterConfig(4))),
}


@pytest.mark.parametrize("config, layers, expected", PUBLISHED.values(), ids=PUBLISHED.keys())
def test_published_models(
    config: dict[str, Any], layers: range | tuple[int, ...], expected: LayerConfig
) -> None:
    arch = find(config)
    assert moe_layers(arch, config) == tuple(layers)
    assert layer_config(arch, config, layers[-1]) == expected
