"""The weights of a model that is in memory, as if they were a checkpoint: what reads the one reads the other."""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from xpar.engine.checkpoint.reader import Checkpoint
from xpar.engine.checkpoint.tensor_file import DTYPES, CheckpointError, TensorEntry

NAMES: Mapping[torch.dtype, str] = {dtype: name for name, dtype in DTYPES.items()}


class InMemory(Checkpoint):
    """``tensors``: by their names in a checkpoint of the family of ``config``. Reads give views where they can."""

    def __init__(self, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        self.path = Path("the model in memory")
        self.config = config
        self._tensors = tensors

    def close(self) -> None:
        """There is nothing to close."""

    @property
    def bytes_read(self) -> int:
        return 0

    def names(self) -> Collection[str]:
        return self._tensors.keys()

    def entry(self, name: str) -> TensorEntry:
        tensor = self._tensor(name)
        return TensorEntry(NAMES.get(tensor.dtype, str(tensor.dtype)), tuple(tensor.shape), 0, tensor.nbytes)

    def read(
        self,
        name: str,
        rows: slice | None = None,
        cols: slice | None = None,
        expect_shape: tuple[int, ...] | None = None,
        out: Tensor | None = None,
        index: int | None = None,
    ) -> Tensor:
        tensor = self._tensor(name)
        if expect_shape is not None and tuple(tensor.shape) != tuple(expect_shape):
            raise CheckpointError(
                f"{name} has shape {list(tensor.shape)}, the model's config implies {list(expect_shape)}"
            )
        part = tensor if index is None else tensor[index]
        part = part if rows is None else part[rows]
        part = part if cols is None else part[:, cols]
        return part if out is None else out.copy_(part)

    def _tensor(self, name: str) -> Tensor:
        if name not in self._tensors:
            raise CheckpointError(f"the model in memory has no tensor {name}, which its family has")
        return self._tensors[name].detach()
