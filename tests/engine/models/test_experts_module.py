"""What is read off an experts module of transformers: activation, sizes, experts a token."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from shrunk_families import NOT_RUN, WITHOUT_INTERFACE, classes, empty_small_model, families, small_model
from torch import nn

from xpar.engine.architectures import ARCHITECTURES
from xpar.engine.architectures.layer_config import find, layer_config, moe_layers
from xpar.engine.checkpoint.reader import CheckpointError
from xpar.engine.models.expert_layer import experts_modules
from xpar.engine.models.experts_module import describe_experts, describe_module
from xpar.engine.models.parallelize import experts_alone
from xpar.kernels.activations import activate
from xpar.kernels.contracts import Activation

ACTIVATIONS = (
    Activation("silu"),
    Activation("gelu"),
    Activation("gelu_tanh"),
    Activation("silu", limit=7.0),
    Activation("silu", limit=7.0, alpha=1.702, beta=1.0),
    Activation("swiglustep", limit=3.5),
    Activation("situ", limit=25.0, beta=4.0),
    Activation("silu", gated=False),
    Activation("relu2", gated=False),
)


class Experts(nn.Module):
    """Experts as transformers has them, with the parameters of ``activation`` among their numbers."""

    def __init__(self, activation: Activation, width: int = 3) -> None:
        super().__init__()
        self.has_gate, self.num_experts, self.some_size = activation.gated, 5, 1024
        rows = activation.gate_up_rows(width)
        weights = nn.Parameter(torch.zeros(5, rows, 8)), nn.Parameter(torch.zeros(5, 8, width))
        setattr(self, "gate_up_proj" if activation.gated else "up_proj", weights[0])
        self.down_proj = weights[1]
        self.limit, self.alpha, self.softcap = activation.limit, activation.alpha, activation.beta
        self.act_fn = nn.Module()
        self.act_fn.forward = lambda x: activate(x, activation)  # type: ignore[method-assign]
        self._apply_gate = lambda x: activate(x, activation)


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
def test_every_activation_is_recognised(activation: Activation) -> None:
    config = describe_module(Experts(activation), 2, "experts")
    assert config.activation == activation
    assert (config.num_experts, config.hidden_size, config.intermediate_size) == (5, 8, 3)
    assert config.router.top_k == 2


def test_an_activation_that_no_kernel_computes_is_one_line() -> None:
    experts = Experts(Activation("silu"))
    experts._apply_gate = lambda x: torch.tanh(x[..., :1]) * x[..., 1:]
    with pytest.raises(CheckpointError, match=r"Experts \(a\.b\): its activation Module is none that") as e:
        describe_module(experts, 2, "a.b")
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    ("model_type", "name"),
    [
        ("gpt_oss", "GptOssForCausalLM"),
        ("zaya", "ZayaForCausalLM"),
        ("kimi_linear", "KimiLinearForCausalLM"),
        ("nemotron_h", "NemotronHForCausalLM"),
        ("aria_text", "AriaTextForCausalLM"),
    ],
)
def test_experts_a_token_are_those_of_a_forward(model_type: str, name: str) -> None:
    model = small_model(model_type, name, seed=1)
    seen: dict[str, SimpleNamespace] = {}

    def called(module: str) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            tensors = [*args, *kwargs.values()]
            ids = next(t for t in tensors if isinstance(t, torch.Tensor) and not t.is_floating_point())
            seen[module] = SimpleNamespace(top_k=ids.shape[-1], hidden=tensors[0].shape[-1])

        return hook

    modules = list(experts_modules(model).values())
    for module in modules:
        model.get_submodule(module).register_forward_pre_hook(called(module), with_kwargs=True)
    with torch.inference_mode():
        model(input_ids=torch.arange(3, 9)[None], use_cache=False)
    assert seen.keys() == set(modules) and modules
    for module in modules:
        config = describe_experts(model, module)
        assert (config.router.top_k, config.hidden_size) == (seen[module].top_k, seen[module].hidden)


KNOWN = [name for name in families() if name in {arch.model_type for arch in ARCHITECTURES} - NOT_RUN.keys()]


@pytest.mark.parametrize("family", KNOWN)
def test_a_schema_describes_the_experts_that_the_model_has(family: str) -> None:
    """What xpar's schema says of a layer is what its experts module says, where there is one."""
    model_type, name = next(entry for entry in classes(family) if entry[0] == family)
    with torch.device("meta"):
        model = empty_small_model(model_type, name)
    values = {**model.config.to_dict(), "model_type": model_type}
    modules, arch = experts_modules(model), find(values)
    if not modules:
        assert family in WITHOUT_INTERFACE
        return
    assert list(modules) == list(moe_layers(arch, values))
    for layer, module in modules.items():
        schema = experts_alone(layer_config(arch, values, layer))
        found = describe_experts(model, module)
        for field in ("num_experts", "hidden_size", "intermediate_size", "activation", "bias"):
            assert getattr(found, field) == getattr(schema, field), field
        assert found.router.top_k == schema.router.top_k
