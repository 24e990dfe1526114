"""The configurations of a checkpoint's layers, and one line for a value that no model has.

The line names the file, the key, the value and the rule. The sizes are checked here, by the words that their
names are made of, before anything is made that is as large.
"""

import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from xpar.engine.architectures.config_key import Key, lookup
from xpar.engine.architectures.layer_config import (
    ARCHITECTURES,
    MAX_LAYERS,
    find,
    layer_config,
    require_moe_layers,
)
from xpar.engine.architectures.layer_weights import stored_layer_config
from xpar.engine.checkpoint.reader import Checkpoint, CheckpointError
from xpar.engine.config import LayerConfig

SIZE = re.compile(r"^(num|n)_|_(size|dim|heads|layers|rank)$|^max_(position_embeddings|seq_len)$|^d_model$")
"""The names of keys that give a size or a count."""
POSITIVE = re.compile(
    r"^(vocab_size|(hidden|intermediate|ffn_hidden)_size|d_model|head_dim|max_(position_embeddings|seq_len)"
    r"|(num|n)_(hidden_)?layers|(num|n)_(attention_|key_value_)?heads)$"
)
"""The names of sizes that no model has as 0."""
MAX_EXPERTS = 2**16
"""More experts than any layer has; transformers makes modules, or lists, of as many."""
LARGEST = 2**31 - 1
"""The largest size that is taken for one."""
FIELDS = ("num_experts", "hidden_size", "intermediate_size", "top_k", "num_expert_group", "topk_group")
"""Fields of a layer's configuration, to which families give keys of other names."""
FAILED_ALLOCATION = re.compile(
    r"can't allocate memory|out of memory|not enough memory|calculation overflowed"
)
"""The messages of torch for too little memory."""


def read_layer_configs(checkpoint: Checkpoint) -> dict[int, LayerConfig]:
    """Return the configuration of every MoE layer, by its number.

    Raises :class:`CheckpointError` for a model without such layers, and for any layer that cannot be.
    """
    config = checkpoint.config
    check_numbers(checkpoint.path / "config.json", config)
    with config_errors(checkpoint):
        arch = find(config)
        return {layer: layer_config(arch, config, layer) for layer in require_moe_layers(arch, config)}


def read_layer_config(checkpoint: Checkpoint, layer: int) -> LayerConfig:
    """Return the configuration of MoE layer ``layer``; raise CheckpointError if that layer has no experts."""
    configs = read_layer_configs(checkpoint)
    if layer not in configs:
        layers = ", ".join(map(str, configs))
        raise CheckpointError(f"{checkpoint.path}: layer {layer} has no experts; the MoE layers are {layers}")
    with config_errors(checkpoint):
        return stored_layer_config(checkpoint, find(checkpoint.config), layer)


@contextmanager
def config_errors(checkpoint: Checkpoint) -> Iterator[None]:
    """Name path and keys of the file in the message of a :class:`CheckpointError` about ``config.json``."""
    try:
        yield
    except CheckpointError as error:
        file, message = checkpoint.path / "config.json", str(error)
        arch = next((a for a in ARCHITECTURES if a.model_type == checkpoint.config.get("model_type")), None)
        for field in FIELDS if arch else ():
            key: Key = getattr(arch, field)
            names = [n for n in key.names if lookup(checkpoint.config, n) is not None] or [*key.names, field]
            message = re.sub(rf"(?<![\w.]){field}=", f"{names[0]}=", message)
        raise CheckpointError(re.sub(r"^config\.json(?=:)", lambda _: str(file), message)) from None


@contextmanager
def allocation_errors(layer: int, where: str) -> Iterator[None]:
    """Turn a failed allocation for the experts of ``layer`` into one :class:`CheckpointError`.

    ``where``: what the message begins with, such as the file that gives the sizes.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and not FAILED_ALLOCATION.search(str(error)):
            raise
        raise CheckpointError(
            f"{where}: the experts of layer {layer} do not fit into this rank's memory; "
            "use more ranks, or check that this config.json belongs to the weights"
        ) from None


def check_numbers(file: Path, values: Mapping[str, Any], prefix: str = "") -> None:
    """Raise :class:`CheckpointError` for the first value that is not finite, or an impossible size."""
    padding, rows = values.get("pad_token_id"), values.get("vocab_size")
    if isinstance(padding, int) and isinstance(rows, int) and padding >= rows > 0:
        raise CheckpointError(f"{file}: {prefix}pad_token_id={padding}: must be less than vocab_size={rows}")
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            check_numbers(file, value, f"{name}.")
        if isinstance(value, float) and not math.isfinite(value):
            raise CheckpointError(f"{file}: {name}={value}: must be a finite number")
        # Latent attention without rotary dimensions (GLM-5-Next) calls those the width of a head.
        is_rotary_width = key == "head_dim" and values.get("qk_rope_head_dim") == 0
        least = int(bool(POSITIVE.search(key)) and not is_rotary_width)
        most = MAX_LAYERS if key.endswith("layers") else MAX_EXPERTS if key.endswith("experts") else LARGEST
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if is_number and SIZE.search(key) and not least <= value <= most:
            raise CheckpointError(f"{file}: {name}={value}: must be {least} to {most}")
