"""A stand-in for vLLM's offline interface, with the arguments that it checks and transformers' answers."""

import os
from types import SimpleNamespace
from typing import Any

import torch
from transformers import AutoModelForCausalLM


class SamplingParams:
    def __init__(self, temperature: float, max_tokens: int, ignore_eos: bool, detokenize: bool) -> None:
        assert temperature == 0.0 and ignore_eos and not detokenize
        self.max_tokens = max_tokens


class LLM:
    def __init__(
        self,
        model: str,
        dtype: str,
        skip_tokenizer_init: bool,
        max_model_len: int,
        enable_prefix_caching: bool,
    ) -> None:
        assert skip_tokenizer_init
        assert not [name for name in os.environ if name.startswith(("PMI", "OMPI_"))]
        if os.environ.get("STAND_IN_FAILS"):
            raise SystemExit("no memory for the cache")
        self.model = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype)).eval()
        self.most, self.caches, self.resets = max_model_len, enable_prefix_caching, 0

    def reset_prefix_cache(self) -> None:
        assert self.caches
        self.resets += 1

    @torch.inference_mode()
    def generate(self, prompts: list[dict[str, Any]], sampling: SamplingParams, use_tqdm: Any) -> list[Any]:
        bar = use_tqdm(total=len(prompts), desc="prompts") if use_tqdm else None
        outputs = []
        for prompt in prompts:
            ids = list(prompt["prompt_token_ids"])
            assert len(ids) + sampling.max_tokens <= self.most
            answer: list[int] = []
            for _ in range(sampling.max_tokens):
                answer.append(int(self.model(torch.tensor([ids + answer])).logits[0, -1].argmax()))
            outputs.append(SimpleNamespace(outputs=[SimpleNamespace(token_ids=tuple(answer))]))
            if bar is not None:
                bar.update(1)
        if bar is not None:
            bar.close()
        return outputs
