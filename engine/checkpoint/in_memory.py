"""The weights of a model in memory, with the interface of a checkpoint."""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from xpar.engine.checkpoint.reader import Checkpoint
from xpar.engine.checkpoint.tensor_file import DTYPE_NAMES, CheckpointError, TensorEntry


class InMemoryCheckpoint(Checkpoint):
    """A :class:`Checkpoint` of tensors in memory.

    ``config``: the model's ``config.json``. ``tensors``: the weights by their names in a checkpoint of the
    family. Reads return views if no ``out`` is given.
    """

    def __init__(self, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        self.path = Path("the model in memory")
        self.config = config
        self._tensors = tensors

    def close(self) -> None:
        """Do nothing, because no file is open."""

    @property
    def bytes_read(self) -> int:
        """The number 0, because no file is read."""
        return 0

    def names(self) -> Collection[str]:
        """Return the names of all tensors."""
        return self._tensors.keys()

    def entry(self, name: str) -> TensorEntry:
        """Return dtype and shape of tensor ``name``; its place in a file is of no meaning."""
        tensor = self._tensor(name)
        return TensorEntry(
            DTYPE_NAMES.get(tensor.dtype, str(tensor.dtype)), tuple(tensor.shape), 0, tensor.nbytes
        )

    def read(
        self,
        name: str,
        rows: slice | None = None,
        cols: slice | None = None,
        expect_shape: tuple[int, ...] | None = None,
        out: Tensor | None = None,
        index: int | None = None,
    ) -> Tensor:
        """Return tensor ``name`` or a slice of it, as :meth:`Checkpoint.read` does."""
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
