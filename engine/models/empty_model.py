"""A model of transformers without memory: its modules on the meta device, to be filled by a loader.

Of a model with images or sound in front, only the part that reads and writes text is kept.
"""

import re
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from xpar.engine.architectures import ARCHITECTURES
from xpar.engine.architectures.layer_config import find
from xpar.engine.checkpoint.reader import Checkpoint, CheckpointError
from xpar.engine.formats.quantised_checkpoint import open_checkpoint
from xpar.engine.layer.checkpoint_config import check_numbers, read_layer_configs
from xpar.engine.models.expert_layer import experts_modules
from xpar.engine.models.hf_config import read_hf_config, transformers_errors
from xpar.engine.models.kv_cache import has_attention
from xpar.engine.models.lm_head import find_head

OTHER_SENSES = re.compile(r"(vision|visual|image|video|audio)(_|$)")
"""The beginning of the names of modules inside a text decoder that compute nothing of text (Ernie-4.5-VL)."""


def build_empty_model(checkpoint: Checkpoint, dtype: torch.dtype) -> Any:
    """Build the text model that ``checkpoint`` describes, in eval mode, on the meta device.

    Raises :class:`CheckpointError` for a config that transformers or xpar cannot make a model of.
    """
    if find_spec("transformers") is None:
        raise ValueError("whole models need transformers (pip install 'xpar[hf]')")
    check_family(checkpoint)
    hf_config = read_hf_config(checkpoint.path)
    file, values = checkpoint.path / "config.json", checkpoint.config
    if hf_config.get_text_config().num_hidden_layers > len(checkpoint.names()):
        raise CheckpointError(
            f"{file}: num_hidden_layers={hf_config.get_text_config().num_hidden_layers}: the checkpoint has "
            "only "
            f"{len(checkpoint.names())} tensors; config.json is not that of these weights"
        )
    auto = _auto_class(file, hf_config)
    with transformers_errors(file, values), torch.device("meta"):
        model = auto.from_config(hf_config, dtype=dtype)
    model.eval()
    drop_towers(model)
    if not is_known(values) and not experts_modules(model):
        raise CheckpointError(
            f"{file}: no module of {type(model).__name__} (model_type={values.get('model_type')!r}) is a "
            "mixture of experts that transformers lets others compute; use a program for dense models"
        )
    if (head := find_head(model)) is None:
        raise CheckpointError(f"{file}: {type(model).__name__} has no head that makes logits of tokens")
    head.register_forward_pre_hook(_in_one_piece)
    return model


def check_generates(path: Path) -> None:
    """Raise ValueError if xpar cannot generate text with the checkpoint at ``path``."""
    with open_checkpoint(path) as checkpoint:
        check_family(checkpoint)
    if find_spec("transformers") is None:
        return  # which loading the model says better
    hf_config = read_hf_config(path)
    if not has_attention(hf_config):
        raise CheckpointError(
            f"{path / 'config.json'}: none of its layers has attention, and transformers does not continue "
            "such a model token by token; xpar score reads texts with it"
        )


def check_family(checkpoint: Checkpoint) -> None:
    """Raise :class:`CheckpointError` for a model that neither a schema nor transformers describes.

    A layer that xpar cannot compute is refused before transformers builds anything.
    """
    file, values = checkpoint.path / "config.json", checkpoint.config
    if is_known(values):
        read_layer_configs(checkpoint)
        return
    check_numbers(file, values)
    if find_spec("transformers") is None:
        find(values)
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    name = values.get("model_type")
    if not isinstance(name, str) or name not in CONFIG_MAPPING:
        code = "; the code beside the weights (auto_map) is never run" if values.get("auto_map") else ""
        raise CheckpointError(
            f"{file}: model_type={name!r} is not a known MoE family, and transformers "
            f"{version('transformers')} has no class for it{code}; known to xpar: "
            f"{', '.join(a.model_type for a in ARCHITECTURES)}; a newer transformers may know it"
        )


def is_known(values: Any) -> bool:
    """Return whether a schema of :mod:`xpar.engine.architectures` describes this ``config.json``."""
    return any(arch.model_type == values.get("model_type") for arch in ARCHITECTURES)


def _auto_class(file: Path, hf_config: Any) -> Any:
    """Choose transformers' class that generates text with a model of ``hf_config``."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForMultimodalLM

    for auto in (AutoModelForCausalLM, AutoModelForMultimodalLM, AutoModelForImageTextToText):
        if type(hf_config) in auto._model_mapping:
            return auto
    raise CheckpointError(
        f"{file}: model_type={hf_config.model_type!r}: transformers {version('transformers')} has no class "
        "that generates text with it"
    )


def drop_towers(model: Any) -> None:
    """Remove the parts of ``model`` that read images or sound: all beside the way to its text decoder.

    The decoder is the innermost of transformers' models around the embedding of tokens.
    """
    from transformers.modeling_utils import PreTrainedModel

    embedding, head = model.get_input_embeddings(), find_head(model)
    around = [
        name
        for name, module in model.named_modules()
        if isinstance(module, PreTrainedModel) and any(m is embedding for m in module.modules())
    ]
    way = max(around, key=len)
    for depth in range(len(way.split(".")) if way else 0):
        owner = model.get_submodule(".".join(way.split(".")[:depth]))
        kept = way.split(".")[depth]
        for name, child in list(owner.named_children()):
            is_part = name == kept or any(module is head for module in child.modules())
            if not is_part and next(child.parameters(), None) is not None:
                setattr(owner, name, torch.nn.Module())
    for name, module in list(model.named_modules()):
        if OTHER_SENSES.match(name.rpartition(".")[2]) and next(module.parameters(), None) is not None:
            model.set_submodule(name, torch.nn.Module())


def _in_one_piece(_: torch.nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """Make the input of the head contiguous.

    The last positions of several rows lie apart in memory, and torch would copy the weight for each row.
    """
    return inputs[0].contiguous(), *inputs[1:]
