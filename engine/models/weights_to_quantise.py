"""The weights of a whole model that are quantised while its checkpoint in floats is read."""

import logging
from collections.abc import Mapping
from typing import Any

from xpar.comm.communicator import Communicator
from xpar.engine.architectures.layer_config import find
from xpar.engine.architectures.quantised_layers import WeightsToQuantise
from xpar.engine.checkpoint.reader import Checkpoint
from xpar.engine.formats.quantised_on_load import Quantisation, QuantisedOnLoad, relative_errors
from xpar.engine.models.expert_sources import stored_expert_names
from xpar.engine.models.experts_module import describe_experts
from xpar.engine.models.packed_linear import packable
from xpar.engine.models.parallelize import MoeModules
from xpar.engine.models.weight_sources import Source

log = logging.getLogger("xpar.models")


def weights_to_quantise(
    model: Any,
    checkpoint: Checkpoint,
    sources: Mapping[str, Source],
    plan: Mapping[str, Source],
    parts: Mapping[int, MoeModules],
    quantisation: Quantisation,
) -> WeightsToQuantise:
    """Collect the weights of experts, and of dense products if asked for, that can be read quantised.

    Args:
        model: The model without memory.
        checkpoint: The checkpoint in floats.
        sources: The stored tensors of all parameters.
        plan: Those of dense parameters.
        parts: The modules of each layer with experts.
        quantisation: The formats.

    Raises:
        CheckpointError: The checkpoint is quantised already.
    """
    weights = WeightsToQuantise(checkpoint, quantisation)
    for layer, part in parts.items():
        if part.experts:
            name = part.names[0]
            names = stored_expert_names(model, name, checkpoint, sources)
            if names is None:
                log.info("%s is not quantised: transformers' conversion mixes its experts", name)
            else:
                weights.add_experts(names, layer, describe_experts(model, name).num_experts)
            continue
        weights.add_layer(find(checkpoint.config), layer)
    for name in packable(model):
        source = plan.get(f"{name}.weight")
        if source is not None and source.name is not None:
            weights.add_dense(source.name)
    return weights


def log_errors(checkpoint: QuantisedOnLoad, quantisation: Quantisation, comm: Communicator) -> None:
    """Log the relative error of all weights, and with DEBUG that of each layer's. Collective."""
    error, layers = relative_errors(comm.all_gather_object(checkpoint.squares))
    for layer, one in layers.items():
        where = f"layer {layer}" if layer >= 0 else "outside of layers"
        log.debug("quantised to %s, %s: relative error %.2e", quantisation, where, one)
    worst = max(layers, key=lambda layer: layers[layer], default=-1)
    log.info(
        "weights quantised to %s: relative error %.2e, at most %.2e (%s)",
        quantisation,
        error,
        layers.get(worst, 0.0),
        f"layer {worst}" if worst >= 0 else "outside of layers",
    )
