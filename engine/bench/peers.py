"""transformers' own layer with the weights of our layer, to be measured beside it."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from xpar.engine.synthetic.layer import SyntheticLayer

IMPLEMENTATIONS = ("grouped_mm", "eager")
"""transformers' implementations of experts that a layer is compared with; they run on any device."""
DECODE_IMPLEMENTATIONS = ("grouped_mm", "batched_mm", "eager")
"""transformers' implementations of experts that decoding is compared with."""


def transformers_layer(hf_config: Mapping[str, Any], layer: SyntheticLayer) -> nn.Module:
    """Build the MoE block of the model of ``hf_config`` with the weights of ``layer``."""
    from transformers import AutoConfig, AutoModelForCausalLM

    values = {k: v for k, v in hf_config.items() if k not in ("model_type", "dtype", "architectures")}
    config = AutoConfig.for_model(hf_config["model_type"], **values)
    with torch.device("meta"):
        block: nn.Module = AutoModelForCausalLM.from_config(config, dtype=layer.dtype).model.layers[0].mlp
    block.to_empty(device="cpu")
    with torch.no_grad():
        _fill(block, layer)
    return block.eval()


def block_function(block: nn.Module, implementation: str) -> Callable[[Tensor], Tensor]:
    """Make a function [T, H] -> [T, H] of ``block`` with an implementation of its experts."""

    @torch.no_grad()
    def call(x: Tensor) -> Tensor:
        block.experts.config._experts_implementation = implementation  # type: ignore[union-attr]
        out = block(x[None])
        result: Tensor = out[0] if isinstance(out, tuple) else out
        return result.reshape(x.shape)

    return call


def _fill(block: nn.Module, layer: SyntheticLayer) -> None:
    """Copy the weights of ``layer`` into ``block``; raise ValueError for a missing one."""
    tensors = {**dict(block.named_parameters()), **dict(block.named_buffers())}
    gate_up, down = tensors.pop("experts.gate_up_proj"), tensors.pop("experts.down_proj")
    for expert in range(layer.config.num_experts):
        for whole, part in zip((gate_up, down), layer.expert(expert), strict=True):
            whole[expert].copy_(part)
    router, shared = layer.router(), layer.shared()
    values = {"gate.weight": router.gate, "gate.e_score_correction_bias": router.correction_bias}
    if shared is not None:
        gate, up = shared.gate_up.chunk(2)
        name = next(n for n in tensors if n.startswith("shared_expert")).partition(".")[0]
        values |= {f"{name}.gate_proj.weight": gate, f"{name}.up_proj.weight": up}
        values |= {f"{name}.down_proj.weight": shared.down, "shared_expert_gate.weight": shared.gate}
    for name, tensor in tensors.items():
        value = values.get(name)
        if value is None:
            raise ValueError(f"transformers' block has a weight {name} that this layer lacks")
        tensor.copy_(value)
