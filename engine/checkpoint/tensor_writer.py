"""A writer of safetensors files that needs one tensor at a time.

Large checkpoints become shards with an index.
"""

import json
import math
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from xpar.engine.checkpoint.reader import INDEX_FILE, SINGLE_FILE
from xpar.engine.checkpoint.tensor_file import DTYPE_NAMES


@dataclass(frozen=True)
class TensorPlan:
    """The name, shape and dtype of a tensor to write."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """The size of the tensor in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


def write_tensors(
    path: Path, plans: Sequence[TensorPlan], values: Callable[[TensorPlan], Tensor], max_shard_bytes: int
) -> None:
    """Write the tensor ``values(plan)`` of every plan, in order, one at a time in memory.

    The file is ``model.safetensors`` if all tensors fit into ``max_shard_bytes``. Otherwise there are shards
    with ``model.safetensors.index.json``, and a tensor above the limit gets a shard of its own.
    """
    shards = list(_shards(plans, max_shard_bytes))
    if len(shards) == 1:
        _write_file(path / SINGLE_FILE, shards[0], values)
        return
    weight_map = {}
    for number, shard in enumerate(shards, start=1):
        filename = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        _write_file(path / filename, shard, values)
        weight_map.update({plan.name: filename for plan in shard})
    index = {"metadata": {"total_size": sum(plan.nbytes for plan in plans)}, "weight_map": weight_map}
    (path / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n")


def _shards(plans: Sequence[TensorPlan], max_shard_bytes: int) -> Iterator[list[TensorPlan]]:
    shard: list[TensorPlan] = []
    size = 0
    for plan in plans:
        if shard and size + plan.nbytes > max_shard_bytes:
            yield shard
            shard, size = [], 0
        shard.append(plan)
        size += plan.nbytes
    yield shard


def _write_file(path: Path, plans: Sequence[TensorPlan], values: Callable[[TensorPlan], Tensor]) -> None:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for plan in plans:
        header[plan.name] = {
            "dtype": DTYPE_NAMES[plan.dtype],
            "shape": list(plan.shape),
            "data_offsets": [offset, offset + plan.nbytes],
        }
        offset += plan.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the format aligns the data to 8 bytes
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for plan in plans:
            file.write(values(plan).reshape(-1).view(torch.uint8).numpy().data)
