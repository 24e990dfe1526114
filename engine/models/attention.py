"""Attention of whole models on a host processor: xpar's where it is faster, else transformers' ``sdpa``.

transformers lets a package provide the attention of its models as it does the experts
(https://huggingface.co/docs/transformers/attention_interface): a function registered by name gets what
``sdpa`` gets. B sequences, Q queries and S keys of each, D numbers of a head; Hq query heads, Hk of keys.
"""

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from xpar.kernels.cpu.attention import Attention

IMPLEMENTATION = "xpar"
"""The name to give as ``attn_implementation``."""
UNSUPPORTED_ARGUMENTS = ("softcap", "position_bias", "cache", "s_aux")
"""Further arguments of models that change the result; calls with them are left to transformers."""


def use_xpar_attention(model: Any) -> bool:
    """Let ``model`` compute attention here instead of by ``sdpa``; return whether it does."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel

    # A family with attention sinks or soft caps has ``eager``; one that does not look it up stays.
    if model.config._attn_implementation != "sdpa" or not model._can_set_attn_implementation():
        return False
    ALL_ATTENTION_FUNCTIONS.register(IMPLEMENTATION, AttentionForward())
    ALL_MASK_ATTENTION_FUNCTIONS.register(IMPLEMENTATION, sdpa_mask)
    # By name, as transformers warns of every other sub-config, such as DBRX's, that no submodel has.
    used = {id(module.config) for module in model.modules() if isinstance(module, PreTrainedModel)}
    inner = [name for name in model.config.sub_configs if id(getattr(model.config, name, None)) in used]
    model.set_attn_implementation(dict.fromkeys(("", *inner), IMPLEMENTATION))
    return True


def backends(device: torch.device) -> AbstractContextManager[None]:
    """Restrict torch's attention on ``device`` to kernels that serve every length, within the context.

    cuDNN's, which torch would take on a GPU, makes a plan for each length that it meets, and a cache has
    another one at every token: 24 ms a step of four layers (H200, torch 2.11).
    """
    if device.type != "cuda":
        return nullcontext()
    return sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH])


class AttentionForward:
    """The attention function that transformers calls; it keeps nothing of a model."""

    def __init__(self) -> None:
        self._attention = Attention()

    def __call__(
        self,
        module: torch.nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        dropout: float = 0.0,
        scaling: float | None = None,
        is_causal: bool | None = None,
        **others: Any,
    ) -> tuple[Tensor, None]:
        """Compute [B, Hq, Q, D], [B, Hk, S, D], [B, Hk, S, D'] -> [B, Q, Hq, D'] contiguous."""
        asked = is_causal if is_causal is not None else getattr(module, "is_causal", True)
        causal = bool(asked) and query.shape[2] > 1 and attention_mask is None
        if dropout or not self._serves(query, key, value, causal, others):
            return _by_sdpa(
                module, query, key, value, attention_mask, dropout, scaling, is_causal=is_causal, **others
            )
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        out = self._attention(query, key, value, attention_mask, causal, scale)
        return out.transpose(1, 2).contiguous(), None

    def _serves(
        self, query: Tensor, key: Tensor, value: Tensor, causal: bool, others: Mapping[str, Any]
    ) -> bool:
        return (
            all(others.get(name) is None for name in UNSUPPORTED_ARGUMENTS)
            and not query.requires_grad
            and not (causal and query.shape[2] != key.shape[2])
            and self._attention.is_suitable(query, key, value)
        )


def _by_sdpa(*arguments: Any, **others: Any) -> tuple[Tensor, None]:
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    out: tuple[Tensor, None] = sdpa_attention_forward(*arguments, **others)
    return out
