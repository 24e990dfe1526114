"""The dense weights of a model: each node reads them once and hands them to its other ranks.

Tensor names and their place in the model are transformers' own: its table of renamings says which parameter a
stored tensor becomes.
"""

import logging
import math
import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from xpar.comm.communicator import Communicator
from xpar.engine.architectures.mlp_weights import INTEGERS
from xpar.engine.checkpoint.reader import Checkpoint, CheckpointError
from xpar.engine.models.weight_sources import FLOATS, Source
from xpar.kernels.contracts import require_finite

log = logging.getLogger("xpar.models")
T = TypeVar("T")
PIECE_BYTES = 16 * 2**20
"""Bytes of a tensor that are read at a time where the tensor is only compared."""


def dense_sources(
    model: Any, checkpoint: Checkpoint, stored: Mapping[str, Source], foreign: tuple[str, ...]
) -> dict[str, Source]:
    """Map each dense parameter or buffer of ``model`` to its stored tensors, in the model's order.

    ``stored``: those of all parameters. ``foreign``: what the names of parameters begin with that others
    fill. Of parameters that the model ties, those that the checkpoint has. Raises :class:`CheckpointError`
    for a parameter that the checkpoint lacks under its own name and that of every parameter tied to it.
    """
    groups = tied_groups(model)
    found, missing = {}, []
    for key in model.state_dict():
        if key.startswith(foreign):
            continue
        if key in stored:
            found[key] = stored[key]
        elif not any(other in stored for other in groups.get(key, ())):
            missing.append(key)
    if missing:
        ties: Mapping[str, str] = getattr(model, "_tied_weights_keys", None) or {}
        head = (
            "; if its head is its embedding, set tie_word_embeddings to true where config.json describes "
            "the language model"
        )
        raise CheckpointError(
            f"{checkpoint.path}: has no tensor for "
            f"{', '.join(missing[:3])}{f' and {len(missing) - 3} more' if len(missing) > 3 else ''}; the "
            f"checkpoint is incomplete, or model_type={checkpoint.config.get('model_type')!r} in its "
            "config.json is not the family of its "
            f"weights{head if set(missing) <= {*ties, *ties.values()} else ''}"
        )
    return found


def tied_groups(model: Any) -> dict[str, tuple[str, ...]]:
    """Map each parameter of ``model`` that its config ties to all parameters tied together with it."""
    tied: Mapping[str, str] = model.all_tied_weights_keys
    groups: dict[str, list[str]] = {}
    for target, source in tied.items():
        groups.setdefault(source, [source]).append(target)
    return {key: tuple(group) for group in groups.values() for key in group}


def load_dense(
    model: Any,
    checkpoint: Checkpoint,
    plan: Mapping[str, Source],
    foreign: tuple[str, ...],
    node: Communicator,
    dtype: torch.dtype,
    on_bytes: Callable[[int], None] = lambda nbytes: None,
) -> int:
    """Give ``model``, built without memory, its dense weights; return their bytes. Collective over ``node``.

    ``plan``, ``foreign``: as of :func:`dense_sources`. Rank 0 of the node reads each tensor and sends it to
    the others. ``on_bytes`` is called with the bytes of each. What goes wrong on that rank is raised as one
    :class:`CheckpointError` on all of the node. Parameters that the model's config ties are tied as
    transformers does it: where the checkpoint has one of them, or equal tensors. Tensors that differ stay
    apart, whatever the config says.
    """
    kept = model._get_dtype_plan(dtype)
    empty = model.state_dict()
    groups = tied_groups(model)
    tensors: dict[str, Tensor] = {}
    # Before any memory is taken: a wrong size in config.json may ask for more than there is.
    on_first(
        partial(_check_shapes, checkpoint, {s.name: empty[key].shape for key, s in plan.items() if s.name}),
        node,
    )
    for key, source in plan.items():
        if key in tensors:
            continue  # made together with another one
        name, kind = source.name, _dtype_of(key, empty[key], kept)
        if name is None:
            kinds = {t: _dtype_of(t, empty[t], kept) for t in source.targets if t in empty}
            made = {t: torch.empty(empty[t].shape, dtype=dtype_of) for t, dtype_of in kinds.items()}
            on_first(partial(_convert, source, model, checkpoint, made), node)
            for target, tensor in made.items():
                tensors[target] = node.broadcast(tensor)
                on_bytes(tensor.nbytes)
            continue
        twin = next((tensors[other] for other in groups.get(key, ()) if other in tensors), None)
        if twin is not None and on_first(partial(_is_equal, checkpoint, name, twin), node):
            on_bytes(twin.nbytes)
            continue
        tensor = torch.empty(empty[key].shape, dtype=kind)
        on_first(partial(read_dense, checkpoint, name, tensor), node)
        tensors[key] = node.broadcast(tensor)
        on_bytes(tensor.nbytes)
    model.load_state_dict(tensors, strict=False, assign=True)
    model.requires_grad_(False)
    _tie(model, tensors, node.rank == 0)
    restore_buffers(model, foreign)
    return sum(tensor.nbytes for tensor in tensors.values())


def _tie(model: Any, tensors: Mapping[str, Tensor], warns: bool) -> None:
    """Tie the parameters that the config ties, but for ``tensors`` that differ (``warns``: log them)."""
    tied: dict[str, str] = model.all_tied_weights_keys
    for target, source in list(tied.items()):
        if target in tensors and source in tensors:
            tied.pop(target)
            if warns:
                log.warning(
                    "%s and %s differ in the checkpoint: they stay apart, although its config ties them",
                    target,
                    source,
                )
    # transformers may tie in either direction, by what is missing.
    model.tie_weights(
        missing_keys={key for key in tied_groups(model) if key not in tensors}, recompute_mapping=False
    )


def restore_buffers(model: Any, foreign: tuple[str, ...]) -> None:
    """Give the buffers that no checkpoint has transformers' values; CheckpointError names what has none."""
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


def _dtype_of(key: str, empty: Tensor, plan: Mapping[str, torch.dtype]) -> torch.dtype:
    """Return the dtype of parameter ``key``: families keep some, such as correction biases, in float32.

    ``empty``: the parameter without memory; tables of integers keep their dtype.
    """
    for pattern, kept in plan.items():
        if re.search(rf"(^|\.){pattern}(\.|$)", key):
            return kept
    return empty.dtype


def on_first(read: Callable[[], T], node: Communicator) -> T:
    """Call ``read`` on rank 0 of the node; return its small value, or raise its error, on all. Collective."""
    outcome: tuple[Any, str | None] = (None, None)
    if node.rank == 0:
        try:
            outcome = read(), None
        except (ValueError, OSError) as error:
            outcome = None, str(error)
    result, problem = node.all_gather_object(outcome)[0]
    if problem is not None:
        raise CheckpointError(problem)
    value: T = result
    return value


def _check_shapes(checkpoint: Checkpoint, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raise :class:`CheckpointError` for the first stored tensor with another shape than in ``shapes``."""
    for name, shape in shapes.items():
        checkpoint.check_shape(name, tuple(shape))


def _is_equal(checkpoint: Checkpoint, name: str, tensor: Tensor) -> bool:
    """Compare the stored tensor ``name``, in the dtype of ``tensor``, with it, some rows at a time."""
    shape = checkpoint.entry(name).shape
    if shape != tuple(tensor.shape) or not shape:
        return False
    step = max(1, PIECE_BYTES * shape[0] // max(1, tensor.nbytes))
    for begin in range(0, shape[0], step):
        rows = slice(begin, min(begin + step, shape[0]))
        if not torch.equal(checkpoint.read(name, rows=rows).to(tensor.dtype), tensor[rows]):
            return False
    return True


def _convert(source: Source, model: Any, checkpoint: Checkpoint, out: Mapping[str, Tensor]) -> None:
    """Fill the tensors ``out`` by transformers' conversion of ``source``."""
    made = source.convert(model, checkpoint)
    for key, tensor in out.items():
        found = made.get(key)
        if found is None or found.shape != tensor.shape:
            shape = "nothing" if found is None else f"shape {list(found.shape)}"
            raise CheckpointError(
                f"{checkpoint.path}: the tensors stored for {key} make {shape}, config.json implies "
                f"{list(tensor.shape)}; config and weights are not of the same model"
            )
        tensor.copy_(found)
        _require_finite(tensor, key, str(found.dtype)[6:])


def read_dense(checkpoint: Checkpoint, name: str, out: Tensor) -> None:
    """Read the tensor ``name`` into ``out``; CheckpointError for one that is no float or not finite."""
    stored = checkpoint.entry(name).dtype
    if stored not in (FLOATS if out.is_floating_point() else INTEGERS):
        raise CheckpointError(
            f"tensor {name} is stored as {stored}: quantised weights need scales, and the file has none for "
            "it, or config.json has no quantization_config; download both again, or use the bfloat16 release"
        )
    checkpoint.read(name, expect_shape=tuple(out.shape), out=out)
    _require_finite(out, name, stored)


def _require_finite(out: Tensor, name: str, stored: str) -> None:
    def message(_: Tensor) -> str:
        return (
            f"tensor {name} holds NaN or infinite values as {str(out.dtype)[6:]} (stored as {stored}); "
            "restore the checkpoint, or choose a dtype of wider range"
        )

    if out.is_floating_point():
        require_finite(out, message, CheckpointError)
