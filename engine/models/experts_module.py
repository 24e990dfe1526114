"""What an experts module of transformers computes, read off the module itself.

Sizes come from the shapes of its parameters, the activation from what its gate gives for known numbers. E
experts of width I between rows of H, k experts a token.
"""

from collections.abc import Iterator
from itertools import product
from typing import Any

import torch
from torch import Tensor

from xpar.engine.architectures.schema import MlpNames
from xpar.engine.checkpoint.reader import CheckpointError
from xpar.engine.config import LayerConfig, RouterConfig
from xpar.kernels.activations import activate
from xpar.kernels.contracts import Activation

TOP_K = (
    "num_experts_per_tok",
    "num_experts_per_token",
    "top_k",
    "topk",
    "moe_topk",
    "moe_top_k",
    "moe_k",
    "top_k_experts",
)
"""The names under which configs and routers keep k."""
PROBE = torch.linspace(-41.0, 41.0, 93)
"""Numbers that an activation is recognised by; they lie on both sides of every bound that models have."""


def describe_experts(model: Any, name: str) -> LayerConfig:
    """Describe the experts module ``name`` of ``model`` as a layer of its own.

    Raises :class:`CheckpointError` for a module that xpar's kernels do not compute.
    """
    return describe_module(model.get_submodule(name), find_top_k(model, name), name)


def describe_module(module: Any, top_k: int, name: str) -> LayerConfig:
    """Describe an experts module of which every token uses ``top_k`` experts; ``name`` is for messages.

    Raises :class:`CheckpointError` for a module that xpar's kernels do not compute.
    """
    down = module.down_proj
    experts, hidden, width = down.shape if not is_transposed(module) else (down.shape[0], *down.shape[:0:-1])
    return LayerConfig(
        num_experts=int(experts),
        hidden_size=int(hidden),
        intermediate_size=int(width),
        # With a norm behind each expert every slot is dispatched as a token of its own.
        router=RouterConfig(top_k=1 if getattr(module, "has_post_expert_norm", False) else top_k),
        activation=_recognise(module, name),
        bias=has_bias(module),
    )


def find_top_k(model: Any, name: str) -> int:
    """Find k of the experts module ``name``: its block's and its router's number before the config's.

    Raises :class:`CheckpointError` where nothing says it.
    """
    block = model.get_submodule(name.rpartition(".")[0])
    config = getattr(model.get_submodule(name), "config", None) or model.config.get_text_config()
    for place in (block, *block.children(), config):
        for attribute in TOP_K:
            value = getattr(place, attribute, None)
            if isinstance(value, int) and value > 0:
                return value
    raise CheckpointError(
        f"{type(model).__name__}: neither {name.rpartition('.')[0]} nor its config says how many experts a "
        "token goes to; xpar cannot run this model"
    )


def is_transposed(module: Any) -> bool:
    """Return whether the experts' weights are stored as [in, out]."""
    return bool(getattr(module, "is_transposed", False))


def has_bias(module: Any) -> bool:
    """Return whether both products of an expert add a bias."""
    return bool(getattr(module, "has_bias", False))


def has_gate(module: Any) -> bool:
    """Return whether the experts have a gate beside the up product."""
    return bool(getattr(module, "has_gate", hasattr(module, "gate_up_proj")))


def module_names(module: Any) -> MlpNames:
    """Name the module's own parameters as :func:`~xpar.engine.architectures.mlp_weights.read_mlp` wants."""
    gated, biased, transposed = has_gate(module), has_bias(module), is_transposed(module)
    return MlpNames(
        gate=None,
        up=None if gated else "up_proj",
        gate_up="gate_up_proj" if gated else None,
        down="down_proj",
        gate_up_bias=("gate_up_proj_bias" if gated else "up_proj_bias") if biased else None,
        down_bias="down_proj_bias" if biased else None,
        storage="stacked",
        interleaved=not getattr(module, "is_concatenated", True),
        up_transposed=transposed,
        down_transposed=transposed,
    )


def _recognise(module: Any, name: str) -> Activation:
    """Find the activation that gives what the module's gate gives."""
    if has_gate(module):
        gate, up = (part.reshape(-1) for part in torch.meshgrid(PROBE, PROBE[::7], indexing="ij"))
        packed = torch.stack([gate, up], dim=-1)
        with torch.no_grad():
            expected: Tensor = module._apply_gate(packed)
        candidates = _gated(_numbers(module))
    else:
        packed = PROBE[:, None]
        with torch.no_grad():
            expected = module.act_fn(packed.clone())
        candidates = (Activation(n, gated=False) for n in ("silu", "gelu", "gelu_tanh", "relu2"))
    for candidate in candidates:
        if torch.allclose(activate(packed.clone(), candidate), expected, rtol=1e-5, atol=1e-5):
            return candidate
    raise CheckpointError(
        f"{type(module).__name__} ({name}): its activation {type(module.act_fn).__name__} is none that "
        "xpar's kernels compute; xpar cannot run this model"
    )


def _numbers(module: Any) -> list[float]:
    """List the numbers that the module and its activation keep, as bounds and factors may be among them."""
    found = [
        float(value)
        for owner in module.modules()
        for value in vars(owner).values()
        if isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < float("inf")
    ]
    return list(dict.fromkeys(found))


def _gated(numbers: list[float]) -> Iterator[Activation]:
    """Yield every gated activation with parameters among ``numbers``, the usual ones first."""
    yield from (Activation("silu"), Activation("gelu"), Activation("gelu_tanh"))
    for limit, alpha, beta in product([*numbers, None], [1.0, *numbers], [0.0, 1.0]):
        yield Activation("silu", limit=limit, alpha=alpha, beta=beta)
    for limit in numbers:
        yield Activation("swiglustep", limit=limit)
    for limit, beta in product([*numbers, None], numbers):
        yield Activation("situ", limit=limit, beta=beta)
