"""The decoder's half of float16 scaling; :mod:`xpar.engine.layer.residual_scaling` is the layers' half."""

from typing import Any

from torch import Tensor, nn

from xpar.engine.layer.residual_scaling import ResidualScale
from xpar.engine.models.block_layer import BlockLayer

BRANCHES = ("self_attn", "mlp")
NORMS = ("input_layernorm", "post_attention_layernorm")
EPSILONS = ("variance_epsilon", "eps")


def scale_decoder(model: Any, scale: ResidualScale) -> None:
    """Divide what ``model`` adds to its residual by the factor of ``scale``, in place.

    That is the output of its embedding, attention and dense layers. The epsilon of each norm of the residual
    is divided by the factor's square, so that all norms, and thereby the logits, are those of the full
    residual. The whole blocks of ``model`` must be scaled already: ``parallelize(model, grid,
    whole_block=True, scale_residual=True)`` does both. Raises ValueError for a decoder with other parts than
    attention, feed-forward block and a norm before each.
    """
    decoder = model.base_model
    layers = list(decoder.layers)
    for layer in layers:
        check_parts(layer)
    norms = [decoder.norm, *(getattr(layer, name) for layer in layers for name in NORMS)]
    for norm in norms:
        name = next(name for name in EPSILONS if hasattr(norm, name))
        setattr(norm, name, scale.epsilon(getattr(norm, name)))

    def divide(_: nn.Module, __: Any, output: Any) -> Any:
        if isinstance(output, Tensor):
            return scale.residual(output)
        return scale.residual(output[0]), *output[1:]

    branches = [getattr(layer, name) for layer in layers for name in BRANCHES]
    for module in (model.get_input_embeddings(), *branches):
        if not isinstance(module, BlockLayer):
            module.register_forward_hook(divide)


def check_parts(layer: nn.Module) -> None:
    """Raise ValueError unless a decoder's ``layer`` has just the parts that :func:`scale_decoder` knows."""
    names = [name for name, _ in layer.named_children()]
    if sorted(names) != sorted((*BRANCHES, *NORMS)):
        raise ValueError(
            f"float16 scaling of {type(layer).__name__}: its parts are {', '.join(names)}, must be "
            f"{', '.join((*BRANCHES, *NORMS))}; use bfloat16"
        )
    for name in NORMS:
        if not any(hasattr(getattr(layer, name), epsilon) for epsilon in EPSILONS):
            raise ValueError(
                f"float16 scaling of {type(layer).__name__}: {name} has no epsilon; use bfloat16"
            )
