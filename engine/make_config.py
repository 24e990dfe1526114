"""The ``config.json`` of a model of a known family in sizes of one's choice."""

import math
from collections.abc import Mapping
from typing import Any

import torch

from xpar.engine.architectures import find, layer_config, moe_layers
from xpar.engine.checkpoint import CONFIG_DTYPES
from xpar.engine.dense_schema import DENSE
from xpar.engine.schema import Architecture
from xpar.engine.tensor_file import CheckpointError


def make_config(
    model_type: str,
    *,
    layers: int,
    experts: int,
    hidden: int,
    intermediate: int,
    top_k: int,
    shared: int | None = None,
    vocab: int = 256,
    dtype: torch.dtype = torch.bfloat16,
    overrides: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The ``config.json`` of such a checkpoint, checked. Arguments as for :func:`make_checkpoint`."""
    arch = find({"model_type": model_type})
    if hidden < 2 or hidden % 2:
        raise CheckpointError(
            f"hidden={hidden}: must be even and positive, rotary embeddings pair the dimensions"
        )
    if dtype not in CONFIG_DTYPES.values():
        raise CheckpointError(f"dtype={dtype}: must be one of {', '.join(CONFIG_DTYPES)}")
    heads = math.gcd(hidden // 2, 8)
    config: dict[str, Any] = {
        "architectures": [arch.model_class],
        "model_type": model_type,
        "dtype": str(dtype).removeprefix("torch."),
        "vocab_size": vocab,
        "intermediate_size": 2 * hidden,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
        **DENSE[model_type].config,
        **_head_dim(model_type, hidden // heads),
        arch.layers.count.names[0]: layers,
        arch.hidden_size.names[0]: hidden,
        arch.num_experts.names[0]: experts,
        arch.intermediate_size.names[0]: intermediate,
        arch.top_k.names[0]: top_k,
        **_dense_layers(arch),
        **_shared_keys(arch, shared, intermediate),
        **_group_keys(arch, experts, top_k),
        **(overrides or {}),
    }
    moe = moe_layers(arch, config)
    if not moe:
        raise CheckpointError(f"layers={layers}: none of them would be a mixture of experts")
    layer_config(arch, config, moe[0])
    return config


def _head_dim(model_type: str, head: int) -> dict[str, int]:
    """Only families whose attention normalises heads take the head size as a key of its own."""
    return {"head_dim": head} if ("head",) in DENSE[model_type].attention.values() else {}


def _dense_layers(arch: Architecture) -> dict[str, int]:
    """Every layer MoE unless overridden."""
    return dict.fromkeys(arch.layers.first_dense.names[:1], 0)


def _shared_keys(arch: Architecture, shared: int | None, intermediate: int) -> dict[str, int]:
    if arch.shared is None:
        if shared:
            raise CheckpointError(f"shared={shared}: {arch.model_type} has no shared experts; leave it out")
        return {}
    count = 1 if shared is None else shared
    if count < 1:
        raise CheckpointError(
            f"shared={shared}: {arch.model_type} always has shared experts; give at least 1"
        )
    if arch.shared.count.names:
        return {arch.shared.count.names[0]: count}
    return {arch.shared.width.names[0]: count * intermediate}


def _group_keys(arch: Architecture, experts: int, top_k: int) -> dict[str, Any]:
    """Groups as the family uses them, if the experts divide: the better half of 8, 4 or 2 groups."""
    if not arch.num_expert_group.names:
        return {}
    fitting = (g for g in (8, 4, 2) if experts % g == 0 and experts >= max(2 * g, 2 * top_k))
    groups = next(fitting, 1)
    keys: dict[str, Any] = {
        arch.num_expert_group.names[0]: groups,
        arch.topk_group.names[0]: max(1, groups // 2),
    }
    if arch.groups_if is not None and groups > 1:
        keys[arch.groups_if[0]] = arch.groups_if[1]
    return keys
