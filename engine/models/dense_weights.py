"""Everything of a model that is not a routed expert, or of its block: read once per node, then handed to the node's other ranks.

Tensor names and their place in the model are transformers' own: its table of renamings says which parameter a stored
tensor becomes.
"""

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from xpar.comm.communicator import Communicator
from xpar.engine.checkpoint.reader import Checkpoint, CheckpointError

FLOATS = frozenset({"F64", "F32", "F16", "BF16"})


def sources(model: Any, checkpoint: Checkpoint, foreign: tuple[str, ...]) -> dict[str, str]:
    """Parameter or buffer of ``model`` -> the stored tensor it comes from, in the model's order.

    ``foreign``: what the names of parameters begin with that others fill. Raises :class:`CheckpointError` for a parameter that the checkpoint lacks, and for one that would have to be
    computed from several tensors.
    """
    stored = _by_target(model, checkpoint)
    tied: Mapping[str, str] = model.all_tied_weights_keys
    found, missing = {}, []
    for key in model.state_dict():
        if key.startswith(foreign) or key in tied:
            continue
        other = next((target for target, source in tied.items() if source == key), "")
        name = stored.get(key) or stored.get(other)
        if name is None:
            missing.append(key)
        else:
            found[key] = name
    if missing:
        raise CheckpointError(
            f"{checkpoint.path}: has no tensor for {', '.join(missing[:3])}"
            f"{f' and {len(missing) - 3} more' if len(missing) > 3 else ''}; the checkpoint is incomplete, or "
            f"model_type={checkpoint.config.get('model_type')!r} in its config.json is not the family of its weights"
        )
    return found


def load_dense(
    model: Any,
    checkpoint: Checkpoint,
    plan: Mapping[str, str],
    foreign: tuple[str, ...],
    node: Communicator,
    dtype: torch.dtype,
    loaded: Callable[[int], None] = lambda nbytes: None,
) -> int:
    """Give ``model``, built without memory, its dense weights; return their bytes. Collective over ``node``.

    ``plan``, ``foreign``: as of :func:`sources`. Rank 0 of the node reads each tensor and sends it to the others. ``loaded``
    hears the bytes of each. What goes wrong on that rank is raised as one :class:`CheckpointError` on all of the node.
    """
    kept = model._get_dtype_plan(dtype)
    empty = model.state_dict()
    tensors: dict[str, Tensor] = {}
    for key, name in plan.items():
        tensor = torch.empty(empty[key].shape, dtype=_dtype_of(key, dtype, kept))
        _read_on_first(checkpoint, name, tensor, node)
        tensors[key] = node.broadcast(tensor)
        loaded(tensor.nbytes)
    model.load_state_dict(tensors, strict=False, assign=True)
    model.requires_grad_(False)
    model.tie_weights()
    restore_buffers(model, foreign)
    return sum(tensor.nbytes for tensor in tensors.values())


def restore_buffers(model: Any, foreign: tuple[str, ...]) -> None:
    """Give the buffers that no checkpoint holds (rotary frequencies) the values that transformers computes for them.

    Raises :class:`CheckpointError` naming what is still without values.
    """
    for tensor in [*model.parameters(), *model.buffers()]:
        tensor._is_hf_initialized = True  # transformers' own mark: its initialisation leaves these alone
    for module in model.modules():
        names = [name for name in module._non_persistent_buffers_set if getattr(module, name) is not None]
        for name in names:
            empty = torch.full_like(getattr(module, name), math.nan, device="cpu")
            setattr(module, name, empty)
        if names:
            model._init_weights(module)
        for name in names:
            if not math.isfinite(float(getattr(module, name).sum())):
                raise CheckpointError(f"{type(module).__name__}: transformers does not restore its {name}")
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.is_meta and not name.startswith(foreign):
            raise CheckpointError(f"{type(model).__name__}: {name} is still empty after loading")


def _by_target(model: Any, checkpoint: Checkpoint) -> dict[str, str]:
    """Key of the model -> name of the stored tensor, for those that are one tensor, unchanged."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    transforms = get_model_conversion_mapping(model)
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    state = model.state_dict()
    found = {}
    for name in checkpoint.names():
        key, converted = rename_source_key(name, renamings, converters, model.base_model_prefix, state)
        if converted is None:
            found[key] = name
    return found


def _dtype_of(key: str, dtype: torch.dtype, plan: Mapping[str, torch.dtype]) -> torch.dtype:
    """Families keep some parameters, such as a router's correction bias, in float32 whatever the model's dtype."""
    for pattern, kept in plan.items():
        if re.search(rf"(^|\.){pattern}(\.|$)", key):
            return kept
    return dtype


def _read_on_first(checkpoint: Checkpoint, name: str, out: Tensor, node: Communicator) -> None:
    problem = None
    if node.rank == 0:
        try:
            _read(checkpoint, name, out)
        except (ValueError, OSError) as error:
            problem = str(error)
    problem = node.all_gather_object(problem)[0]
    if problem is not None:
        raise CheckpointError(problem)


def _read(checkpoint: Checkpoint, name: str, out: Tensor) -> None:
    stored = checkpoint.entry(name).dtype
    if stored not in FLOATS:
        raise CheckpointError(
            f"tensor {name} is stored as {stored}: quantised weights need scales that are not read; "
            "convert the checkpoint to bfloat16 first"
        )
    checkpoint.read(name, expect_shape=tuple(out.shape), out=out)
    if not math.isfinite(float(out.sum())) and not bool(torch.isfinite(out).all()):
        raise CheckpointError(
            f"tensor {name} holds NaN or infinite values as {str(out.dtype)[6:]} (stored as {stored}); "
            "restore the checkpoint, or choose a dtype of wider range"
        )
