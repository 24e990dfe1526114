"""Random checkpoints written by transformers' own model classes, an optional extra."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from xpar.engine.architectures.layer_config import find
from xpar.engine.synthetic.config import synthetic_schema
from xpar.engine.synthetic.values import fill_random, fill_table


def write_with_transformers(
    path: Path,
    config: Mapping[str, Any],
    dtype: torch.dtype,
    generator: torch.Generator,
    max_shard_bytes: int,
) -> None:
    """Build a model of ``config``, fill its tensors with random values, and save it at ``path``."""
    from transformers import AutoConfig, AutoModelForCausalLM

    values = {key: value for key, value in config.items() if key != "model_type"}
    hf_config = AutoConfig.for_model(config["model_type"], **values)
    with torch.device("meta"):  # saves the model's own initialisation, which would be overwritten
        model = AutoModelForCausalLM.from_config(hf_config, dtype=dtype)
    model.to_empty(device="cpu")
    with torch.no_grad():
        arch = find(config)
        experts, schema = arch.num_experts.get(config, int), synthetic_schema(arch)
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point():
                fill_random(name, tensor, generator, schema)
            else:
                fill_table(tensor, experts, generator)
    with _no_progress_bar():
        model.save_pretrained(path, max_shard_size=max_shard_bytes)


@contextmanager
def _no_progress_bar() -> Iterator[None]:
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
