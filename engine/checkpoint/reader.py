"""A Hugging Face checkpoint directory, whose safetensors files are read by byte range."""

import json
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from xpar.engine.checkpoint.tensor_file import DTYPES, CheckpointError, TensorEntry, TensorFile
from xpar.engine.config import StoredActivations
from xpar.kernels.quantised_weight import QuantisedWeight, WeightFormat

__all__ = ["Checkpoint", "CheckpointError", "TensorEntry"]

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

CONFIG_DTYPES: Mapping[str, torch.dtype] = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}


class Checkpoint:
    """A checkpoint directory, of which only the requested bytes are read.

    ``config`` is the parsed ``config.json``. A safetensors file is opened, and its header read, once, at the
    first request for one of its tensors. Methods raise :class:`CheckpointError` for a directory, file or
    tensor that is missing, truncated or corrupt.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        if not self.path.is_dir():
            raise CheckpointError(f"{self.path}: not a directory; give the folder that holds config.json")
        self.config: Mapping[str, Any] = read_json(self.path / "config.json")
        self._files: dict[str, TensorFile] = {}
        self._bytes_of_closed_files = 0
        self._weight_map = self._read_index()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the files; a later read opens them again."""
        self._bytes_of_closed_files = self.bytes_read
        for file in self._files.values():
            file.close()
        self._files.clear()

    @property
    def bytes_read(self) -> int:
        """The number of bytes read from safetensors files so far, headers included."""
        return self._bytes_of_closed_files + sum(file.bytes_read for file in self._files.values())

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that ``config.json`` declares for the model or its language model."""
        inner = self.config.get("text_config")
        configs = [self.config, inner] if isinstance(inner, Mapping) else [self.config]
        declared = (config.get(key) for config in configs for key in ("dtype", "torch_dtype"))
        name = str(next((value for value in declared if value), None))
        if name not in CONFIG_DTYPES:
            raise CheckpointError(
                f"{self.path / 'config.json'}: dtype={name!r} is not one of {', '.join(CONFIG_DTYPES)}; "
                "set it, or choose a dtype explicitly"
            )
        return CONFIG_DTYPES[name]

    def names(self) -> Collection[str]:
        """Return the names of all tensors; a header is read only if there is no index."""
        if self._weight_map is not None:
            return self._weight_map.keys()
        file = self._files.get(SINGLE_FILE) or self._files.setdefault(
            SINGLE_FILE, TensorFile(self.path / SINGLE_FILE)
        )
        return file.entries.keys()

    def weight_files(self) -> list[str]:
        """Return the names of the safetensors files, sorted."""
        return [SINGLE_FILE] if self._weight_map is None else sorted(set(self._weight_map.values()))

    def entry(self, name: str) -> TensorEntry:
        """Return dtype, shape and place in its file of tensor ``name``."""
        return self._find_file(name).entries[name]

    def check_shape(self, name: str, shape: tuple[int, ...]) -> None:
        """Raise :class:`CheckpointError` unless the stored tensor ``name`` has ``shape``."""
        file = self._find_file(name)
        stored = file.entries[name].shape
        if stored != tuple(shape):
            raise CheckpointError(
                f"{file.path}: tensor {name} has shape {list(stored)}, config.json implies {list(shape)}; "
                "config and weights are not of the same model"
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
        """Read a tensor or a slice of it; bytes outside the slice are not read.

        Args:
            name: name of the tensor.
            rows: slice of the first dimension, with step 1 and within the stored shape.
            cols: slice of the second dimension, likewise.
            expect_shape: the shape that the whole stored tensor must have.
            out: contiguous tensor of the sliced shape that receives the values, converted to its dtype.
            index: read only this entry of the first dimension; ``rows`` and ``cols`` slice the entry.

        Returns:
            ``out``, or a new tensor of the stored dtype.

        Raises:
            CheckpointError: the tensor is missing, has another shape or an unknown dtype.
            ValueError: a slice or ``out`` does not fit the tensor.
        """
        if expect_shape is not None:
            self.check_shape(name, expect_shape)
        file = self._find_file(name)
        entry = file.entries[name]
        if entry.dtype not in DTYPES:
            raise CheckpointError(
                f"{file.path}: tensor {name} has unknown dtype {entry.dtype}; known: {', '.join(DTYPES)}"
            )
        row_range, col_range, shape = slice_ranges(name, entry_shape(name, entry.shape, index), rows, cols)
        dtype = DTYPES[entry.dtype]
        if out is not None and (tuple(out.shape) != shape or not out.is_contiguous()):
            raise ValueError(f"tensor {name}: out is {list(out.shape)}, must be contiguous and {list(shape)}")
        direct = out is not None and out.dtype == dtype and out.device.type == "cpu"
        target = out if out is not None and direct else torch.empty(shape, dtype=dtype)
        file.read_into(name, target, row_range, col_range, index)
        return target if out is None or direct else out.copy_(target)

    def weight_format(self, name: str) -> WeightFormat | None:
        """Return the format in which tensor ``name`` is quantised; None for one that is not."""
        return None

    def activations(self, name: str) -> StoredActivations:
        """Return how the inputs of tensor ``name`` are quantised."""
        return StoredActivations(None, "the experts are plain numbers")

    def expert_inputs(self) -> StoredActivations:
        """Return how the inputs of routed experts are quantised, by the first one that is found."""
        return self.activations("")

    def describe_conversions(self, dtype: torch.dtype) -> str:
        """Describe the quantised weights that were read as ``dtype``; empty if none were."""
        return ""

    def smallest_cut(self, name: str) -> tuple[int, int]:
        """Return the rows and columns of which a slice of tensor ``name`` should be a multiple."""
        return 1, 1

    def smallest_code_unit(self, name: str) -> int:
        """Return the columns of tensor ``name`` whose codes share a byte or a word."""
        return 1

    def read_quantised(
        self,
        name: str,
        rows: slice | None = None,
        cols: slice | None = None,
        index: int | None = None,
        block: tuple[int, int] | None = None,
    ) -> QuantisedWeight:
        """Read codes and scales of a slice of tensor ``name``, whose :meth:`weight_format` is not None."""
        raise ValueError(f"tensor {name} is not quantised; read it with read()")

    def _find_file(self, name: str) -> TensorFile:
        filename = SINGLE_FILE if self._weight_map is None else self._weight_map.get(name)
        where = self.path / (filename or INDEX_FILE)
        if filename is not None:
            file = self._files.get(filename) or self._files.setdefault(filename, TensorFile(where))
            if name in file.entries:
                return file
        raise CheckpointError(
            f"{where}: has no tensor {name}; the checkpoint is incomplete, or model_type="
            f"{self.config.get('model_type')!r} in its config.json is not the family of its weights"
        )

    def _read_index(self) -> Mapping[str, str] | None:
        if (self.path / SINGLE_FILE).exists():
            return None
        index = self.path / INDEX_FILE
        if not index.exists():
            raise CheckpointError(
                f"{self.path}: holds neither {SINGLE_FILE} nor {INDEX_FILE}; weights in another format must "
                "first be "
                "converted to safetensors (transformers: model.save_pretrained)"
            )
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not all(
            isinstance(f, str) and Path(f).name == f for f in weight_map.values()
        ):
            raise CheckpointError(
                f"{index}: weight_map must map tensor names to file names in the same folder"
            )
        return weight_map


def entry_shape(name: str, shape: tuple[int, ...], index: int | None) -> tuple[int, ...]:
    """Return the shape of entry ``index`` of the first dimension, or ``shape`` without index."""
    if index is None:
        return shape
    if len(shape) < 2 or not 0 <= index < shape[0]:
        raise ValueError(f"tensor {name} of shape {list(shape)} has no entry {index} of its first dimension")
    return shape[1:]


def slice_ranges(
    name: str, shape: tuple[int, ...], rows: slice | None, cols: slice | None
) -> tuple[slice, slice | None, tuple[int, ...]]:
    """Return the ranges of rows and columns with explicit ends, and the shape of the slice."""
    if (rows is not None and not shape) or (cols is not None and len(shape) < 2):
        raise ValueError(f"tensor {name} of shape {list(shape)} cannot be sliced by rows={rows}, cols={cols}")
    row_range = _bounds(name, rows, shape[0] if shape else 1)
    col_range = None if cols is None else _bounds(name, cols, shape[1])
    sliced = (row_range.stop - row_range.start, *shape[1:]) if shape else ()
    if col_range is not None:
        sliced = (sliced[0], col_range.stop - col_range.start, *sliced[2:])
    return row_range, col_range, sliced


def _bounds(name: str, part: slice | None, size: int) -> slice:
    """Give ``part`` explicit ends; raise ValueError for ends outside the dimension of ``size``."""
    if part is None:
        return slice(0, size)
    start = 0 if part.start is None else part.start
    stop = size if part.stop is None else part.stop
    if part.step not in (None, 1) or not 0 <= start <= stop <= size:
        raise ValueError(f"tensor {name}: {part} must have step 1 and lie within 0..{size}")
    return slice(start, stop)


def read_json(path: Path) -> Mapping[str, Any]:
    """Read the JSON object in the file ``path``; raise :class:`CheckpointError` for anything else."""
    try:
        value = json.loads(path.read_bytes())
    except OSError as error:
        raise CheckpointError(
            f"{path}: cannot be read ({error.strerror}); a checkpoint folder in the Hugging Face format has "
            "it"
        ) from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not valid JSON ({error}); copy or download the file again") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: holds a JSON {type(value).__name__}, must hold an object")
    return value
