"""A quantised checkpoint as the float checkpoint of the same model.

The weight of every quantised module has its usual name and its logical shape; its codes and scales have no
names of their own. A read makes floats of the codes and scales that the slice touches, and of no others.
"""

import logging
import os
from collections import Counter
from collections.abc import Collection
from pathlib import Path

import torch
from torch import Tensor

from xpar.engine.checkpoint.reader import Checkpoint, entry_shape, slice_ranges
from xpar.engine.checkpoint.tensor_file import CheckpointError, TensorEntry
from xpar.engine.config import WEIGHTS_ALONE, StoredActivations
from xpar.engine.formats.dequantise import dequantise_into
from xpar.engine.formats.registry import (
    CACHE_SCALES,
    COMPANIONS,
    find_modules,
    make_weight,
    quantisation_of,
    without_quantisation,
)
from xpar.engine.formats.schemes import SchemeOf, schemes_of
from xpar.engine.formats.stored_weight import Parts, Scheme, StoredWeight, cut_units, refine
from xpar.kernels.quantised_weight import CodeType, QuantisedWeight, WeightFormat

log = logging.getLogger("xpar.formats")


def open_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Open a checkpoint directory; a quantised one is presented in floats.

    Raises :class:`CheckpointError` for a directory that is none, and for a format that is not read.
    """
    stored = Checkpoint(Path(path))
    config = quantisation_of(stored)
    return stored if config is None else QuantisedCheckpoint(stored, schemes_of(config))


class QuantisedCheckpoint(Checkpoint):
    """The interface of a float :class:`Checkpoint` over ``stored``, which has codes and scales.

    ``config`` is that of the float model. :meth:`read_quantised` returns codes and scales themselves.
    """

    def __init__(self, stored: Checkpoint, scheme_of: SchemeOf) -> None:
        self.path, self.stored = stored.path, stored
        self.config = without_quantisation(stored.config)
        self._scheme_of = scheme_of
        self._modules = {name: module for module, name in find_modules(stored.names())}
        self._weights: dict[str, StoredWeight | None] = {}
        self._warned: set[str] = set()
        self._names = dict.fromkeys(self._visible_names())
        self._converted: Counter[str] = Counter()

    def close(self) -> None:
        """Close the files; a later read opens them again."""
        self.stored.close()

    @property
    def bytes_read(self) -> int:
        """The number of bytes read from safetensors files so far, headers included."""
        return self.stored.bytes_read

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that ``config.json`` declares; bfloat16 for float16, which scales alone need."""
        declared = super().dtype
        return torch.bfloat16 if declared == torch.float16 else declared

    def names(self) -> Collection[str]:
        """Return the names of all tensors of the float checkpoint."""
        return self._names.keys()

    def weight_files(self) -> list[str]:
        """Return the names of the safetensors files, sorted."""
        return self.stored.weight_files()

    def entry(self, name: str) -> TensorEntry:
        """Return dtype and shape of tensor ``name``; a quantised one is F32 and has no place in a file."""
        weight = self.find(name)
        return self.stored.entry(name) if weight is None else TensorEntry("F32", _shown_shape(weight), 0, 0)

    def check_shape(self, name: str, shape: tuple[int, ...]) -> None:
        """Raise :class:`CheckpointError` unless tensor ``name`` has ``shape``."""
        if self.find(name) is None:
            self.stored.check_shape(name, shape)
        elif (found := self.entry(name).shape) != tuple(shape):
            raise CheckpointError(
                f"{self.path}: quantised tensor {name} has shape {list(found)}, config.json implies "
                f"{list(shape)}; config and weights are not of the same model"
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
        """Read a tensor or a slice of it, as :meth:`Checkpoint.read`; a quantised one becomes float32."""
        weight = self.find(name)
        if weight is None:
            return self.stored.read(name, rows, cols, expect_shape, out, index)
        if expect_shape is not None:
            self.check_shape(name, expect_shape)
        shape = _shown_shape(weight)
        if index is None and len(shape) == 3:
            part = slice(0, shape[0]) if rows is None else rows
            stack = [self.read(name, cols=cols, index=e) for e in range(*part.indices(shape[0]))]
            whole = torch.stack(stack) if stack else torch.empty(0, *shape[1:])
            return whole if out is None else out.copy_(whole)
        row_range, col_range, sliced = slice_ranges(name, entry_shape(name, shape, index), rows, cols)
        if out is not None and (tuple(out.shape) != sliced or not out.is_contiguous()):
            raise ValueError(
                f"tensor {name}: out is {list(out.shape)}, must be contiguous and {list(sliced)}"
            )
        col_range = slice(0, sliced[1]) if col_range is None else col_range
        target = torch.empty(sliced, dtype=torch.float32) if out is None else out
        if weight.is_transposed:
            self._fill(weight, target.T, index, col_range, row_range)
        else:
            self._fill(weight, target, index, row_range, col_range)
        return target

    def weight_format(self, name: str) -> WeightFormat | None:
        """Return the format of quantised tensor ``name`` if kernels can compute from it, else None."""
        weight = self.find(name)
        return None if weight is None or not weight.keeps_its_codes else weight.format

    def activations(self, name: str) -> StoredActivations:
        """Return how the inputs of tensor ``name`` are quantised; they are only where its codes are e4m3."""
        weight = self.find(name)
        if weight is None:
            return StoredActivations(None, "the experts are plain numbers")
        found = weight.scheme.activations
        if found.scheme is None or (weight.keeps_its_codes and weight.format.code is CodeType.E4M3):
            return found
        return StoredActivations(None, f"they are multiplied by {weight.format} codes, which take floats")

    def expert_inputs(self) -> StoredActivations:
        """Return how the inputs of routed experts are quantised, by the first that has a scheme."""
        names = [name for name in self._modules if ".experts." in name] or list(self._modules)
        found = WEIGHTS_ALONE
        for name in names:
            scheme = self._scheme_of(self._modules[name])
            if scheme is not None and scheme.activations.scheme is not None:
                found = self.activations(name)
                if found.scheme is not None:
                    break
        return found

    def smallest_cut(self, name: str) -> tuple[int, int]:
        """Return the rows and columns of W [N, K] of which a slice that keeps the format is a multiple."""
        weight = self.find(name)
        return (1, 1) if weight is None else weight.smallest_cut

    def smallest_code_unit(self, name: str) -> int:
        """Return the columns of tensor ``name`` whose codes share a byte or a word."""
        weight = self.find(name)
        return 1 if weight is None else weight.unit[1]

    def read_quantised(
        self,
        name: str,
        rows: slice | None = None,
        cols: slice | None = None,
        index: int | None = None,
        block: tuple[int, int] | None = None,
    ) -> QuantisedWeight:
        """Read codes and scales of a slice of W [N, K], outputs first whatever :meth:`read` presents.

        Args:
            name: name of the tensor, of which :meth:`weight_format` is not None.
            rows: slice of N, of whole blocks.
            cols: slice of K, likewise.
            index: entry of a stack [E, N, K].
            block: smaller blocks than the format's, each of which divides one of them and repeats its scale.

        Raises:
            CheckpointError: the tensor is missing or damaged.
            ValueError: it is not quantised, or a slice begins or ends inside a block.
        """
        weight = self.find(name)
        if weight is None or not weight.keeps_its_codes:
            raise ValueError(f"tensor {name} has no codes that kernels can compute from; read it with read()")
        row_range, col_range, sliced = slice_ranges(name, entry_shape(name, weight.shape, index), rows, cols)
        col_range = slice(0, sliced[1]) if col_range is None else col_range
        block = weight.format.block if block is None else block
        for part, size, unit in zip(
            (row_range, col_range), weight.shape[-2:], cut_units(weight, block), strict=True
        ):
            if part.start % unit or (part.stop % unit and part.stop != size):
                raise ValueError(f"tensor {name}: {part} is no multiple of {unit}, the block of its format")
        return refine(weight.read(index, row_range, col_range), block)

    def find(self, name: str) -> StoredWeight | None:
        """Return the stored weight behind quantised tensor ``name``; None for any other tensor."""
        module = self._modules.get(name)
        if module is None:
            return None
        if name not in self._weights:
            parts = Parts(self.stored, module, self._warned)
            scheme = self._scheme_of(module)
            weight = make_weight(parts, scheme or Scheme("none"))
            if weight is not None:
                if scheme is None:
                    raise CheckpointError(
                        f"{self.path / 'config.json'}: quantization_config leaves {module} unquantised, but "
                        "the file has its scales; config.json is not that of these weights"
                    )
                _ = weight.format  # checks dtypes and shapes
            self._weights[name] = weight
        return self._weights[name]

    def describe_conversions(self, dtype: torch.dtype) -> str:
        """Describe what has been read as ``dtype`` so far, by format, and what that costs in memory."""
        kinds = {name.partition("|")[0] for name in self._converted}
        return "; ".join(
            f"{self._converted[f'{kind}|weights']} weights of {kind} as {str(dtype)[6:]}: "
            f"{self._converted[f'{kind}|values'] * dtype.itemsize / 1e6:.1f} MB of memory for "
            f"{self._converted[f'{kind}|bytes'] / 1e6:.1f} MB of the file"
            for kind in sorted(kinds)
        )

    def _visible_names(self) -> list[str]:
        """List the names of the float checkpoint, each weight where its marker stands."""
        weight_of = {module: name for name, module in self._modules.items()}
        names, cache_scales = [], 0
        for name in self.stored.names():
            ends = [end for end in COMPANIONS if name.endswith(end)] if name.endswith(COMPANIONS) else []
            modules = [name.removesuffix(end) for end in ends]
            weight = next((weight_of[module] for module in modules if module in weight_of), None)
            if name.endswith(CACHE_SCALES):
                cache_scales += 1
            else:
                names.append(name if weight is None else weight)
        if cache_scales:
            log.info("%s: %d scales of attention caches are not used", self.path, cache_scales)
        return names

    def _fill(self, weight: StoredWeight, out: Tensor, index: int | None, rows: slice, cols: slice) -> None:
        """Write a slice of W into ``out`` [rows, cols], which may be a transposed view."""
        if not out.numel():
            return
        size_n, size_k = weight.shape[-2:]
        wide_rows, wide_cols = _widen(rows, weight.unit[0], size_n), _widen(cols, weight.unit[1], size_k)
        before = self.stored.bytes_read
        codes = weight.read(index, wide_rows, wide_cols)
        kind = str(weight.format)
        self._converted.update(
            {
                f"{kind}|weights": 1,
                f"{kind}|values": out.numel(),
                f"{kind}|bytes": self.stored.bytes_read - before,
            }
        )
        if (rows, cols) == (wide_rows, wide_cols):
            dequantise_into(codes, out)
            return
        whole = torch.empty(codes.shape, dtype=out.dtype)
        dequantise_into(codes, whole)
        first_row, first_col = rows.start - wide_rows.start, cols.start - wide_cols.start
        out.copy_(whole[first_row : first_row + out.shape[0], first_col : first_col + out.shape[1]])


def _shown_shape(weight: StoredWeight) -> tuple[int, ...]:
    """Return the shape of the same weight in a float checkpoint."""
    *stack, rows, cols = weight.shape
    return (*stack, cols, rows) if weight.is_transposed else (*stack, rows, cols)


def _widen(part: slice, unit: int, size: int) -> slice:
    """Return the smallest range of multiples of ``unit`` around ``part``, within ``size``."""
    return slice(part.start // unit * unit, min(-(-part.stop // unit) * unit, size))
