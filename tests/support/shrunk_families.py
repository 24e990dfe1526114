"""A small random checkpoint of every family of the installed transformers that has routed experts.

Configurations are shrunk by the names of their keys: few layers, one of each kind that the family has, and
odd small sizes. What a family needs besides is in ``VALUES``.
"""

import re
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

VOCABULARY = 258
MOST_LAYERS = 5
MOST_PARAMETERS = 8e6
WITHOUT_INTERFACE = ("dbrx", "jetmoe", "llama4", "longcat_flash", "step3p7")
"""Families with routed experts that transformers does not let others compute."""
AROUND = ("kimi_k25", "nemotron3_5_transcribe", "nemotron_h_omni")
"""Families whose text model is another family's: only their default configurations say so."""
NOT_RUN: Mapping[str, str] = {
    "dbrx": "not shrunk here; tests/engine/models/test_whole_families_mpi.py has it",
    "diffusion_gemma": "generates blocks by diffusion, not token by token",
    "nemotron3_5_transcribe": "writes down speech; its text model is nemotron_h",
    "openai_privacy_filter": "classifies tokens, generates none",
}
"""Families that the walk leaves out, and why."""
NOT_RUN_CLASSES: dict[str, str] = {
    "Qwen3OmniMoeForConditionalGeneration": "speaks; its thinker is in the walk",
}
if find_spec("scipy") is None:
    # It passes where scipy is installed; its text model is in the walk anyway.
    NOT_RUN_CLASSES["InklingForConditionalGeneration"] = "transformers needs scipy for it"
if version("transformers") == "5.24.0":
    # Its forward reads `image_outputs` of an output that has none, with or without images.
    NOT_RUN_CLASSES["Llama4ForConditionalGeneration"] = "ends in an AttributeError in transformers 5.24.0"
TEXT: Mapping[str, int] = {
    **dict.fromkeys(("vocab_size", "unpadded_vocab_size", "vocab_size_per_layer_input"), VOCABULARY),
    "hidden_size": 64,
    "head_dim": 16,
    "swa_head_dim": 16,
    "qk_head_dim": 16,
    **dict.fromkeys(("num_attention_heads", "swa_num_attention_heads"), 4),
    "swa_num_key_value_heads": 2,
    **dict.fromkeys(("intermediate_size", "dense_intermediate_size", "ffn_hidden_size"), 40),
    **dict.fromkeys(("moe_intermediate_size", "expert_ffn_hidden_size"), 24),
    **dict.fromkeys(
        (
            "shared_expert_intermediate_size",
            "shared_intermediate_size",
            "shared_experts_intermediate_size",
            "share_expert_dim",
        ),
        20,
    ),
    "moe_hidden_size": 56,
    **dict.fromkeys(("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts"), 6),
    **dict.fromkeys(
        ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k_experts", "moe_top_k"), 2
    ),
    "zero_expert_num": 2,
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 12,
    "o_lora_rank": 16,
    "o_groups": 2,
    "index_topk": 6,
    "index_head_dim": 16,
    # Fewer heads give many scores of exactly 0, and ties between tokens.
    "index_n_heads": 8,
    "index_block_size": 4,
    "index_topk_blocks": 2,
    **dict.fromkeys(("sliding_window", "sliding_window_size"), 7),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "linear_head_dim"), 16),
    "linear_num_key_heads": 2,
    **dict.fromkeys(("linear_num_value_heads", "linear_num_heads"), 4),
    **dict.fromkeys(
        ("mamba_n_heads", "mamba_num_heads", "mamba_dt_rank", "mamba_chunk_size", "chunk_size"), 8
    ),
    **dict.fromkeys(("mamba_d_head", "mamba_head_dim", "mamba_d_state", "ssm_state_size"), 16),
    "n_groups": 2,
    "conv_kernel": 4,
    "router_hidden_size": 16,
    "gated_norm_rank": 4,
    "d_rel": 4,
    "rel_extent": 16,
    **dict.fromkeys(("max_position_embeddings", "model_max_length"), 512),
    **dict.fromkeys(("first_k_dense_replace", "num_dense_layers"), 1),
}
"""The sizes of a text model, by the names of their keys."""
ENDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
TOWER: Mapping[str, int] = {
    **dict.fromkeys(
        ("hidden_size", "embed_dim", "intermediate_size", "encoder_ffn_dim", "d_model", "mlp_dim"), 32
    ),
    **dict.fromkeys(
        ("num_heads", "num_attention_heads", "num_key_value_heads", "encoder_attention_heads"), 2
    ),
    **dict.fromkeys(("depth", "num_hidden_layers", "encoder_layers", "num_layers", "n_layers"), 1),
    "image_size": 28,
    "patch_size": 14,
    **dict.fromkeys(("head_dim", "output_channels"), 16),
    **dict.fromkeys(("out_hidden_size", "output_dim", "text_hidden_size"), 64),
    "vision_output_dim": 32,
}
"""The sizes of what reads images or sound."""
GEMMA4 = {
    "num_experts": 6,
    "top_k_experts": 2,
    "moe_intermediate_size": 24,
    "enable_moe_block": True,
    "hidden_size_per_layer_input": 0,
}
LLAMA4 = {"num_experts_per_tok": 1, "interleave_moe_layer_step": 2, "intermediate_size_mlp": 40}
MINIMAX_M3 = {
    "layer_types": ["full_attention", "minimax_m3_sparse", "minimax_m3_sparse"],
    "index_n_heads": 2,
}
QWEN4 = {
    "indexer_n_heads": 8,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 16,
    "indexer_budget": 8,
    "indexer_compress_ratio": 2,
    "ple_layer_ids": [1],
    "ple_embed_dim": 32,
    "heads_per_ngram": 2,
    "ngram_vocab_size_base": 61,
    "make_ngram_vocab_size_divisible_by": 2,
    "split_ngram_parts": 2,
}
VALUES: Mapping[str, Mapping[str, Any]] = {
    "deepseek_ocr2": {
        "text_config": {
            "num_experts_per_tok": 2,
            "num_hidden_layers": 3,
            "mlp_layer_types": ["dense", "sparse", "sparse"],
        }
    },
    "deepseek_v2": {
        "num_experts_per_tok": 2,
        "n_group": 2,
        "topk_group": 1,
        "topk_method": "group_limited_greedy",
    },
    "dots1": {
        "n_routed_experts": 6,
        "num_experts_per_tok": 2,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
    },
    "dots3_note": {
        "vision_config": {"adapter_in_dim": 32, "adapter_out_dim": 64},
        "audio_config": {"adapter_input_size": 32, "adapter_out_dim": 64},
    },
    "ernie4_5_vl_moe": {
        "text_config": {
            "moe_intermediate_size": [24, 16],
            "rope_parameters": {"rope_theta": 5e5, "rope_type": "default", "mrope_section": [3, 3, 2]},
        }
    },
    "gemma4": {"text_config": GEMMA4, "vision_config": None, "audio_config": None},
    "gemma4_text": GEMMA4,
    "glm4v_moe": {
        "text_config": {
            "rope_parameters": {
                "rope_theta": 1e4,
                "rope_type": "default",
                "partial_rotary_factor": 0.5,
                "mrope_section": [2, 1, 1],
            }
        }
    },
    "glm5_next": {"text_config": {"index_kpool": 2}},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention", "linear_attention"]},
    "hunyuan_v1_moe": {"num_experts": 6, "moe_topk": 2, "head_dim": 16},
    "hy_v4_vl": {
        "text_config": {
            "rope_parameters": {"rope_theta": 1e4, "rope_type": "default", "mrope_section": [2, 1, 1]}
        }
    },
    "jamba": {
        "num_hidden_layers": 4,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
    },
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv", "full_attention"], "num_hidden_layers": 4},
    "llama4": {
        "text_config": LLAMA4,
        "vision_config": {"projector_input_dim": 32, "projector_output_dim": 32},
    },
    "llama4_text": LLAMA4,
    "longcat_flash": {"num_layers": 2, "num_hidden_layers": 4},
    "minimax_m3_vl": {"text_config": MINIMAX_M3},
    "minimax_m3_vl_text": MINIMAX_M3,
    "mistral_large4": {"text_config": {"kv_source_layers": None}},
    "nemotron_h_omni": {
        "vision_config": {"video_temporal_patch_size": 2},
        "projector_hidden_size": 32,
        "vision_hidden_size": 32,
    },
    "muse_spark": {
        "projector_hidden_size": 32,
        "audio_config": {
            "num_hidden_layers": 1,
            "patch_sizes": [16],
            "hidden_sizes": [16],
            "depths": [1],
        },
    },
    "qwen4_exp": {"text_config": QWEN4},
    "qwen4_exp_text": QWEN4,
    "step3p7": {
        "text_config": {
            "num_hidden_layers": 4,
            "swiglu_limits": [0.0, 0.0, 0.5, 0.5],
            "layer_types": ["full_attention", "full_attention", "sliding_attention", "sliding_attention"],
            "mlp_layer_types": ["dense", "sparse", "sparse", "sparse"],
            "sliding_window": 7,
            "num_sliding_attention_heads": 4,
        }
    },
    "zaya": {"num_experts_per_tok": 1},
}
"""The small values of families that cannot be shrunk by the names of their keys alone, by ``model_type``."""


def families() -> list[str]:
    """List the families with routed experts, by the names of transformers' folders, without importing it."""
    root = Path((find_spec("transformers").submodule_search_locations or [""])[0]) / "models"  # type: ignore[union-attr]
    found = {
        path.parent.name
        for path in root.glob("*/modeling_*.py")
        if "@use_experts_implementation" in path.read_text()
    }
    return sorted(found | {name for name in (*WITHOUT_INTERFACE, *AROUND) if (root / name).is_dir()})


def classes(family: str) -> Iterator[tuple[str, str]]:
    """Yield (model_type, class) of every model of ``family`` that transformers generates text with."""
    from transformers.models.auto import modeling_auto as auto
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES, model_type_to_module_name

    maps: list[Mapping[str, str]] = [
        auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        {**auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES, **auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES},
    ]
    for model_type in CONFIG_MAPPING_NAMES:
        if model_type_to_module_name(model_type) == family:
            for name in dict.fromkeys(m[model_type] for m in maps if model_type in m):
                if name not in NOT_RUN_CLASSES:
                    yield model_type, name


def small_model(model_type: str, class_name: str, seed: int) -> Any:
    """Make a small random float32 model of transformers' class ``class_name``, with its own classes."""
    torch.manual_seed(seed)
    model = empty_small_model(model_type, class_name)
    assert sum(p.numel() for p in model.parameters()) < MOST_PARAMETERS
    _draw(model, torch.Generator().manual_seed(seed))
    return model


def empty_small_model(model_type: str, class_name: str) -> Any:
    """Make a small model with the values that transformers gives it."""
    import transformers

    config = small_config(model_type)
    kind = getattr(transformers, class_name)
    if kind.config_class is not type(config):
        config = config.get_text_config()
    # The reference: each expert in a loop.
    config._experts_implementation = "eager"
    return kind._from_config(config, dtype=torch.float32).eval()


def small_config(model_type: str) -> Any:
    """Shrink the default configuration of ``model_type``."""
    from transformers import AutoConfig

    values = shrink(AutoConfig.for_model(model_type).to_dict())
    for key, value in VALUES.get(model_type, {}).items():
        both = isinstance(value, Mapping) and isinstance(values.get(key), dict)
        values[key] = {**values[key], **value} if both else value
    return AutoConfig.for_model(model_type, **values)


def shrink(config: Mapping[str, Any], is_text: bool = True) -> dict[str, Any]:
    """Return small values for the keys of ``config`` whose names are known."""
    sizes = TEXT if is_text else TOWER
    small: dict[str, Any] = _layers(config, MOST_LAYERS if is_text else 1)
    special = iter(range(201, VOCABULARY - 2))
    for key, value in config.items():
        if key in small or key == "model_type":
            continue
        if isinstance(value, dict) and "model_type" in value:
            inner = shrink(value, re.search("text|thinker|language", key) is not None)
            small[key] = {**inner, "model_type": value["model_type"]}
        elif key == "per_layer_config":
            small[key] = {}
        elif key in ENDS:
            small[key] = ENDS[key]
        elif not isinstance(value, int) or isinstance(value, bool) or value == 0:
            continue
        elif key.endswith(("_token_id", "_token_index")):
            small[key] = next(special)
        elif key == "num_key_value_heads" and is_text:
            small[key] = 1 if value == 1 else 4 if value == config.get("num_attention_heads") else 2
        elif key in ("n_group", "num_expert_group", "topk_group"):
            small[key] = min(value, 1 if key == "topk_group" else 2)
        elif key == "head_dim" and value == config.get("qk_rope_head_dim"):
            small[key] = sizes["qk_rope_head_dim"]
        elif key in sizes:
            small[key] = sizes[key]
    return small


def _layers(config: Mapping[str, Any], most: int) -> dict[str, Any]:
    """Choose layers, one of each kind and three at least; return the lists that have an entry a layer."""
    count = config.get("num_hidden_layers")
    if not count:
        return {}
    lists = {key: value for key, value in config.items() if isinstance(value, list) and len(value) == count}
    if not lists or most == 1:
        return {"num_hidden_layers": min(count, most), **{key: value[:most] for key, value in lists.items()}}
    kinds: dict[tuple[str, ...], int] = {}
    for layer in range(count):
        kind = tuple(str(value[layer]) for key, value in lists.items() if key != "kv_source_layers")
        kinds.setdefault(kind, layer)
    chosen = sorted(kinds.values())
    chosen += [layer for layer in range(count) if layer not in chosen][: max(0, 3 - len(chosen))]
    chosen = sorted(chosen)[:most]
    return {
        "num_hidden_layers": len(chosen),
        **{key: [value[layer] for layer in chosen] for key, value in lists.items()},
    }


def _draw(model: Any, generator: torch.Generator) -> None:
    """Draw weights; vectors stay near the values that the model itself gives them."""
    biases = (b for name, b in model.named_buffers() if "bias" in name and b.is_floating_point())
    with torch.no_grad():
        for tensor in [*model.parameters(), *biases]:
            noise = torch.randn(tensor.shape, generator=generator)
            if tensor.ndim > 1:
                tensor.copy_(0.15 * noise)
            else:
                tensor.add_(0.1 * noise)
