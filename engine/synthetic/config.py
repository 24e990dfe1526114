"""The ``config.json`` of a model of a known family in any sizes."""

import math
from collections.abc import Mapping
from copy import deepcopy
from typing import Any

import torch

from xpar.engine.architectures import ARCHITECTURES
from xpar.engine.architectures.layer_config import find, layer_config, moe_layers
from xpar.engine.architectures.schema import Architecture
from xpar.engine.architectures.synthetic_schema import SyntheticSchema
from xpar.engine.checkpoint.reader import CONFIG_DTYPES
from xpar.engine.checkpoint.tensor_file import CheckpointError


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
    """Make and check a ``config.json``; see :func:`make_checkpoint` for arguments and errors."""
    arch = find({"model_type": model_type})
    schema = synthetic_schema(arch)
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
        **_dense_width(schema, 2 * hidden),
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
        **_head_dim(schema, hidden // heads),
        **deepcopy(dict(schema.config)),
        **_dense_layers(arch),
        **_shared_keys(arch, shared, intermediate),
        **_group_keys(arch, experts, top_k),
        **_layer_kinds(arch, layers),
    }
    sizes = (
        (arch.layers.count, layers),
        (arch.hidden_size, hidden),
        (arch.num_experts, experts),
        (arch.intermediate_size, intermediate),
        (arch.top_k, top_k),
    )
    for key, value in sizes:
        _set(config, key.names[0], value)
    for name, value in (overrides or {}).items():
        _set(config, name, value)
    moe = moe_layers(arch, config)
    if not moe:
        raise CheckpointError(f"layers={layers}: none of them would be a mixture of experts")
    layer_config(arch, config, moe[0])
    return config


def writable_families() -> tuple[str, ...]:
    """Return the ``model_type`` of every family whose checkpoints can be written."""
    return tuple(arch.model_type for arch in ARCHITECTURES if arch.synthetic is not None)


def synthetic_schema(arch: Architecture) -> SyntheticSchema:
    """Return what writers need of a family; raise CheckpointError if no checkpoint of it can be written."""
    if arch.synthetic is None:
        known = ", ".join(writable_families())
        raise CheckpointError(f"{arch.model_type}: can be read, not written; choose one of {known}")
    return arch.synthetic


def usual_top_k(model_type: str) -> int:
    """Return 2 experts per token, or 1 for a family that takes no more."""
    return 1 if find({"model_type": model_type}).weight_on_input else 2


def _set(config: dict[str, Any], name: str, value: Any) -> None:
    """Set ``config[name]``; the name ``a.b`` is key b of the object a."""
    *path, last = name.split(".")
    for part in path:
        config = config.setdefault(part, {})
    config[last] = value


def _head_dim(schema: SyntheticSchema, head: int) -> dict[str, int]:
    """Return the key of the head size, which only some families have."""
    return {"head_dim": head} if schema.needs_head_dim else {}


def _dense_width(schema: SyntheticSchema, width: int) -> dict[str, int]:
    """Return the key of the dense layers' width, if there are any; it may be the experts' elsewhere."""
    return {} if schema.dense_key is None else {"intermediate_size": width}


def _dense_layers(arch: Architecture) -> dict[str, int]:
    """Return the key that makes every layer a MoE layer."""
    return dict.fromkeys(arch.layers.first_dense.names[:1], 0)


def _layer_kinds(arch: Architecture, layers: int) -> dict[str, list[str]]:
    """Return the key of the kinds of layers, for a family that lists them."""
    if not arch.layers.kinds:
        return {}
    return dict.fromkeys(arch.layers.kinds[:1], [arch.layers.moe_kinds[0]] * layers)


def _shared_keys(arch: Architecture, shared: int | None, intermediate: int) -> dict[str, int]:
    """Return the keys of ``shared`` shared experts; CheckpointError for a number that the family has not."""
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
    if arch.shared.width == arch.intermediate_size:
        if count != 1:
            raise CheckpointError(f"shared={shared}: {arch.model_type} always has one; leave it out")
        return {}
    return {arch.shared.width.names[0]: count * intermediate}


def _group_keys(arch: Architecture, experts: int, top_k: int) -> dict[str, Any]:
    """Return the keys of grouped routing: half of 8, 4 or 2 groups, if the experts divide."""
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
