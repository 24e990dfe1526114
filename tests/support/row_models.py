"""Small models whose results transformers lets depend on the whole call, and what transformers gives for one
text alone."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from moe_families import Case
from tiny_models import SIZES, write_tokenizer
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from xpar.engine.synthetic.config import make_config

ORIGINAL = 16
"""Tokens of a text that the short factors are for."""
LONG = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "factor": 4.0,
    "original_max_position_embeddings": ORIGINAL,
}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}


@dataclass(frozen=True)
class Variant:
    """A family and what of its configuration makes a row depend on others.

    ``rope``: LONG, DYNAMIC or the family's own.
    """

    name: str
    model_type: str
    rope: Mapping[str, Any] | None = None
    more: Mapping[str, Any] = field(default_factory=dict)


def _ropes(*families: str) -> list[Variant]:
    return [
        Variant(f"{family}-{rope['rope_type']}", family, rope)
        for family in families
        for rope in (LONG, DYNAMIC)
    ]


TEMPERATURE = {
    "attn_temperature_tuning": True,
    "floor_scale": 4,
    "attn_scale": 0.5,
    "no_rope_layers": [1, 0, 1],
    "layer_types": ["chunked_attention", "full_attention", "chunked_attention"],
}
SMOOTH = {"router_jitter_noise": 10.0}
"""No expert is far enough from the best to be left out: else a weight may turn on the last bit of a score."""
ROPES = (
    *_ropes(
        "qwen3_moe", "olmoe", "deepseek_v3", "deepseek_v2", "gpt_oss", "granitemoe", "minimax_m2", "dots1"
    ),
    # Reads a sequence again where it outgrows the short factors, and multiplies by other numbers besides.
    Variant(
        "phimoe-longrope",
        "phimoe",
        {**LONG, "short_mscale": 1.0, "long_mscale": 1.3},
        {"original_max_position_embeddings": ORIGINAL, **SMOOTH},
    ),
)
OTHERS = (
    Variant("mixtral-window", "mixtral", more={"sliding_window": 4}),
    Variant("gpt_oss-window", "gpt_oss", more={"sliding_window": 4}),
    Variant("cohere2_moe-window", "cohere2_moe", more={"sliding_window": 4}),
    Variant("phimoe-window", "phimoe", more={"sliding_window": 4, **SMOOTH}),
    Variant("llama4-temperature", "llama4_text", more=TEMPERATURE),
    Variant("llama4-chunks", "llama4_text", more={**TEMPERATURE, "attention_chunk_size": 8}),
    *(
        Variant(family, family)
        for family in ("qwen2_moe", "glm4_moe", "granitemoeshared", "ernie4_5_moe", "hunyuan_v1_moe")
    ),
    *(Variant(family, family) for family in ("longcat_flash", "dbrx", "jetmoe", "deepseek_v3")),
)


def build(variant: Variant, seed: int, dtype: torch.dtype = torch.float32) -> Any:
    """The model, with weights so large that attention looks far back."""
    top_k = Case(variant.name, variant.model_type).top_k
    sizes = {"layers": 3, "experts": 8, "hidden": 64, "intermediate": 48, "top_k": top_k}
    values = dict(
        make_config(variant.model_type, **sizes, vocab=SIZES["vocab"], dtype=dtype, overrides=variant.more)
    )
    config = AutoConfig.for_model(values.pop("model_type"), **values)
    if variant.rope is not None:
        own = config.rope_parameters or {}
        dim = getattr(config, "qk_rope_head_dim", None) or getattr(config, "head_dim", None)
        part = own.get("partial_rotary_factor", 1.0)
        half = int((dim or config.hidden_size // config.num_attention_heads) * part) // 2
        config.rope_parameters = {**variant.rope, "partial_rotary_factor": part}
        if variant.rope["rope_type"] == "longrope":
            factors = {"short_factor": [1.0] * half, "long_factor": [1.0 + i for i in range(half)]}
            config.rope_parameters |= factors
        config.max_position_embeddings = ORIGINAL if variant.rope is DYNAMIC else 256
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.15)
    return model


def write(variant: Variant, path: Path, seed: int) -> None:
    """A checkpoint with a tokenizer beside it."""
    build(variant, seed).save_pretrained(path)
    write_tokenizer(path)


@torch.inference_mode()
def logprobs_alone(model: Any, ids: Sequence[int]) -> Tensor:
    """[T - 1] of ids[1:], of one forward of the text; ``model`` has seen no other."""
    logits = model(torch.tensor([ids])).logits[0, :-1].double()
    return logits.log_softmax(-1).gather(1, torch.tensor(ids[1:])[:, None])[:, 0]


@dataclass(frozen=True)
class Alone:
    """``answer``: tokens. ``logits``: [N, V] that they were chosen by.

    ``gap``: the least distance of a choice to the next.
    """

    answer: list[int]
    logits: Tensor

    @property
    def gap(self) -> float:
        best = self.logits.topk(2).values
        return float((best[:, 0] - best[:, 1]).min())


@torch.inference_mode()
def answer_alone(model: Any, ids: Sequence[int], new: int) -> Alone:
    """What transformers' greedy ``generate`` makes of one prompt, with no token that ends it.

    ``model`` has seen no other.
    """
    prompt = torch.tensor([ids], device=model.device)
    out = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        do_sample=False,
        max_new_tokens=new,
        eos_token_id=None,
        pad_token_id=0,
        output_logits=True,
        return_dict_in_generate=True,
        # Where a text grows past the short factors, Phi-3.5-MoE reads it again; transformers 5.17 drops the
        # cache there and reads the last token only. Without a cache every version reads all of it.
        use_cache=model.config.model_type != "phimoe",
    )
    return Alone(out.sequences[0, len(ids) :].tolist(), torch.cat(out.logits))
