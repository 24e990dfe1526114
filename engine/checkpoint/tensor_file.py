"""One safetensors file, read by byte range.

In this format (https://huggingface.co/docs/safetensors) 8 bytes give the length N of the header,
little-endian; N bytes of JSON map the name of each tensor to its dtype, shape and data offsets; the data
follow. Ranges are read with ``preadv`` into the destination tensor. They are not mapped, because a rank
reports how many bytes it reads.
"""

import json
import math
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}

DTYPE_NAMES: Mapping[torch.dtype, str] = {dtype: name for name, dtype in DTYPES.items()}

# The format's own limit; a damaged length must not cause an allocation of the size of the file.
MAX_HEADER_BYTES = 100_000_000


class CheckpointError(ValueError):
    """An error in a checkpoint; its message names the file or tensor, the rule and the remedy."""


@dataclass(frozen=True)
class TensorEntry:
    """The dtype, shape and place of a tensor in a file.

    ``dtype`` is the name in the format; ``begin`` and ``end`` count bytes of the file from 0.
    """

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


class TensorFile:
    """An open safetensors file. ``bytes_read`` counts the bytes read so far, with the header."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.bytes_read = 0
        try:
            # The file stays open, because opening a file is slow on a parallel file system.
            self._file = open(path, "rb", buffering=0)  # noqa: SIM115
        except OSError as error:
            raise CheckpointError(
                f"{path}: cannot be opened ({error.strerror}); is the checkpoint complete and readable?"
            ) from None
        self._size = os.fstat(self._file.fileno()).st_size

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    @cached_property
    def entries(self) -> Mapping[str, TensorEntry]:
        """The place of every tensor by its name; the header is read and checked on first use."""
        if self._size < 8:
            raise self._corrupt(f"{self._size} bytes are too few for a safetensors file")
        prefix = bytearray(8)
        self._fill(memoryview(prefix), 0)
        (length,) = struct.unpack("<Q", prefix)
        if length > min(self._size - 8, MAX_HEADER_BYTES):
            raise self._corrupt(
                f"the header claims {length} bytes, the file has {self._size - 8} after its length, "
                f"the format allows {MAX_HEADER_BYTES}"
            )
        text = bytearray(length)
        self._fill(memoryview(text), 8)
        try:
            header = json.loads(text.decode("utf-8"))
            return {
                name: self._entry(name, value, 8 + length)
                for name, value in header.items()
                if name != "__metadata__"
            }
        except CheckpointError:
            raise
        except (ValueError, AttributeError, RecursionError):
            raise self._corrupt("the header is not a JSON object") from None

    def read_into(
        self, name: str, out: Tensor, rows: slice, cols: slice | None, index: int | None = None
    ) -> None:
        """Fill ``out`` with a slice of a tensor.

        Args:
            name: name of the tensor.
            out: contiguous tensor of the stored dtype.
            rows: range of the first dimension.
            cols: range of the second dimension; only its bytes are read.
            index: an entry of the first dimension, which ``rows`` and ``cols`` then slice. The caller has
                checked the bounds of all three.
        """
        entry = self.entries[name]
        if out.numel() == 0:
            return
        data = out.reshape(-1).view(torch.uint8).numpy().data
        shape, begin, end = entry.shape, entry.begin, entry.end
        if index is not None:
            nbytes = (end - begin) // shape[0]
            shape, begin, end = shape[1:], begin + index * nbytes, begin + (index + 1) * nbytes
        row_bytes = (end - begin) // shape[0] if shape else 0
        begin += rows.start * row_bytes
        if cols is None or cols.stop - cols.start == shape[1]:
            self._fill(data, begin)
            return
        item = row_bytes // shape[1]
        width = (cols.stop - cols.start) * item
        begin += cols.start * item
        for row in range(rows.stop - rows.start):
            self._fill(data[row * width : (row + 1) * width], begin + row * row_bytes)

    def _entry(self, name: str, value: Any, data_begin: int) -> TensorEntry:
        try:
            dtype = str(value["dtype"])
            shape = tuple(int(n) for n in value["shape"])
            begin, end = (int(n) for n in value["data_offsets"])
        except (KeyError, TypeError, ValueError, OverflowError):
            raise self._corrupt(f"the entry of tensor {name} lacks dtype, shape or data_offsets") from None
        if begin < 0 or end < begin or any(n < 0 for n in shape):
            raise self._corrupt(f"tensor {name} has offsets [{begin}, {end}) and shape {list(shape)}")
        if dtype in DTYPES and end - begin != math.prod(shape) * DTYPES[dtype].itemsize:
            raise self._corrupt(
                f"tensor {name}: {end - begin} bytes cannot hold {dtype} of shape {list(shape)}"
            )
        if data_begin + end > self._size:
            raise CheckpointError(
                f"{self.path}: truncated: tensor {name} ends at byte {data_begin + end}, the file at "
                f"{self._size}; copy or download the file again"
            )
        return TensorEntry(dtype, shape, data_begin + begin, data_begin + end)

    def _fill(self, buffer: memoryview, offset: int) -> None:
        """Fill ``buffer`` with the bytes of the file from ``offset`` on."""
        while buffer:
            try:
                count = os.preadv(self._file.fileno(), [buffer], offset)
            except OSError as error:
                raise CheckpointError(
                    f"{self.path}: reading at byte {offset} failed ({error.strerror})"
                ) from None
            if count == 0:
                raise CheckpointError(
                    f"{self.path}: ends at byte {offset}, {len(buffer)} bytes early: it was shortened while "
                    "in use"
                )
            self.bytes_read += count
            offset += count
            buffer = buffer[count:]

    def _corrupt(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: corrupt: {what}; copy or download the file again")
