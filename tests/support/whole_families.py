"""One small whole model of every family, with a tokenizer of bytes."""

import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from moe_families import ONE_PER_FAMILY, Case
from safetensors.torch import load_file, save_file
from tiny_models import BYTES, write_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM

from xpar.engine.architectures.stored_names import standalone_name

SIZES: Mapping[str, Any] = {"experts": 8, "vocab": BYTES + 2}
SCALED: Mapping[str, Mapping[str, Any]] = {
    "granitemoe": {"logits_scaling": 3.0},
    "granitemoeshared": {"logits_scaling": 3.0},
    "cohere2_moe": {"logit_scale": 0.25},
    # transformers computes gpt-oss with a limit of 7 whatever its config says.
    "gpt_oss": {"swiglu_limit": 7.0},
}
"""What families do between their layers and their logits, and what else their models need."""
VISION = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "image_size": 28,
    "patch_size": 14,
    "vision_output_dim": 32,
    "projector_input_dim": 32,
    "projector_output_dim": 32,
}
GEMMA4_TEXT = {
    "vocab_size": BYTES + 2,
    "hidden_size": 64,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "global_head_dim": 16,
    "num_experts": 8,
    "top_k_experts": 3,
    "moe_intermediate_size": 48,
    "enable_moe_block": True,
    "hidden_size_per_layer_input": 0,
    "num_kv_shared_layers": 0,
    "final_logit_softcapping": 2.0,
    "pad_token_id": 0,
}
LLAMA4_TEXT = {
    "vocab_size": BYTES + 2,
    "hidden_size": 64,
    "intermediate_size": 48,
    "intermediate_size_mlp": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_local_experts": 8,
    "num_experts_per_tok": 1,
    "interleave_moe_layer_step": 2,
    "pad_token_id": 0,
}


def _case(case: Case) -> Case:
    overrides = {**case.overrides, **SCALED.get(case.model_type, {})}
    return replace(case, name=case.model_type, overrides=overrides)


CASES = {c.model_type: _case(c) for c in ONE_PER_FAMILY if c.architecture.why_layers_only is None}
CASES["qwen3_next-mixed"] = replace(
    CASES["qwen3_next"], overrides={"layer_types": ["linear_attention", "full_attention", "linear_attention"]}
)
CASES["jamba-mixed"] = replace(
    CASES["jamba"], overrides={**CASES["jamba"].overrides, "attn_layer_period": 3, "attn_layer_offset": 1}
)
CASES["nemotron_h-mamba"] = replace(
    CASES["nemotron_h"], overrides={"layers_block_type": ["mamba", "moe", "full_attention"]}
)
NESTED = ("llama4", "gemma4", "gemma4_text")
FAMILIES = (*CASES, *NESTED)


def write_family(name: str, path: Path, seed: int) -> None:
    """Write the model of family ``name``, fp32 and random, with its tokenizer, as transformers saves it."""
    if name in CASES:
        case = CASES[name]
        case.write(path, "transformers", torch.float32, seed, layers=3, **SIZES)
    else:
        _write_nested(name, path, seed)
    write_tokenizer(path)


def _write_nested(name: str, path: Path, seed: int) -> None:
    import transformers

    if name == "llama4":
        config = AutoConfig.for_model(name, text_config=LLAMA4_TEXT, vision_config=VISION, dtype="float32")
        model: Any = transformers.Llama4ForConditionalGeneration(config)
    elif name == "gemma4":
        config = AutoConfig.for_model(
            name, text_config=GEMMA4_TEXT, vision_config=None, audio_config=None, dtype="float32"
        )
        model = AutoModelForCausalLM.from_config(config)
    else:
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **GEMMA4_TEXT, dtype="float32"))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.1, generator=generator)
    model.save_pretrained(path)


def save_as_modules(path: Path, out: Path) -> None:
    """Save the model at ``path`` under the names of transformers' own modules, experts stacked."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    model.save_pretrained(out, save_original_format=False)
    write_tokenizer(out)


def save_inside_a_larger_model(path: Path, out: Path) -> None:
    """Copy the model at ``path`` with its tensors named as those of a part of a larger model."""
    shutil.copytree(path, out)
    tensors = load_file(out / "model.safetensors")
    save_file(
        {f"language_model.{standalone_name(name)}": x for name, x in tensors.items()},
        out / "model.safetensors",
    )


def edit(path: Path, change: Any) -> None:
    """Let ``change`` edit the tensors of a checkpoint of one file, a dictionary."""
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
