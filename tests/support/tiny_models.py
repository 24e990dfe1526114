"""Small whole models with a tokenizer of bytes, and what transformers alone makes of them, token by token."""

import random
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from moe_families import ONE_PER_FAMILY, Case
from transformers import AutoModelForCausalLM

from xpar.engine.synthetic.byte_tokenizer import write_byte_tokenizer

BYTES = 256
END = BYTES + 1
SIZES: dict[str, Any] = {"layers": 2, "experts": 7, "vocab": BYTES + 2}
FAMILIES = (
    "mixtral",
    "qwen2_moe",
    "qwen3_moe",
    "olmoe",
    "deepseek_v2",
    "deepseek_v3",
    "gpt_oss",
    "glm4_moe",
    "granitemoe",
)
TEMPLATE = (
    "{% for m in messages %}<s>{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
CLEAR = 1e-4
"""A greedy choice whose logit is this much above the next may not depend on rounding in float32."""


def cases() -> tuple[Case, ...]:
    """One model a family.

    Seven experts divide by no number of ranks, but DeepSeek's groups need an even number.
    """
    # transformers 5.17 computes gpt-oss with a limit of 7 whatever its config says.
    return tuple(
        Case(c.model_type, c.model_type, {} if c.model_type == "gpt_oss" else c.overrides)
        for c in ONE_PER_FAMILY
        if c.model_type in FAMILIES
    )


def write_model(case: Case, path: Path, dtype: torch.dtype, seed: int, **sizes: Any) -> None:
    """A checkpoint with a tokenizer beside it."""
    grouped = {"experts": 8} if "deepseek" in case.model_type else {}
    case.write(path, "own", dtype, seed, **{**SIZES, **grouped, **sizes})
    write_tokenizer(path)


def write_tokenizer(path: Path) -> None:
    """One token a byte, a begin and an end, and a template for chats."""
    write_byte_tokenizer(path, BYTES + 2)
    (path / "chat_template.jinja").write_text(TEMPLATE)


def plain_model(path: Path, dtype: torch.dtype = torch.float32) -> Any:
    """The model as transformers loads it, all experts in this process."""
    return AutoModelForCausalLM.from_pretrained(path, dtype=dtype).eval()


@lru_cache(maxsize=64)
def reference_model(path: Path) -> Any:
    """The model of :func:`plain_model` in float32, loaded once a process for tests that leave it as it is."""
    return plain_model(path)


@dataclass(frozen=True)
class Plain:
    """``answer``: tokens, the end not among them.

    ``gap``: the least distance of a chosen logit to the next.
    """

    answer: list[int]
    gap: float


@torch.inference_mode()
def greedy(model: Any, ids: Sequence[int], most: int, ends: Collection[int]) -> Plain:
    """The definition: no cache, no batch, the whole sequence again for each token."""
    answer: list[int] = []
    gap = float("inf")
    while len(answer) < most:
        best = model(torch.tensor([[*ids, *answer]])).logits[0, -1].float().topk(2)
        gap = min(gap, float(best.values[0] - best.values[1]))
        if int(best.indices[0]) in ends:
            break
        answer.append(int(best.indices[0]))
    return Plain(answer, gap)


def prompts(seed: int, count: int, longest: int = 12) -> list[str]:
    """``count`` texts of 1 to ``longest`` letters."""
    draw = random.Random(seed)
    return [
        "".join(draw.choices("abcdefgh xyz", k=draw.randint(1, longest))).replace(" ", "_")
        for _ in range(count)
    ]
