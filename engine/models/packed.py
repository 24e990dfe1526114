"""The dense products of a model from packed weights, which host processors read faster; the plain weights go.

K inputs, N outputs of a layer.
"""

from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn

from xpar.comm.columns import SharedColumns, columns_of
from xpar.comm.handshake import Tag
from xpar.engine.models.attention import provide
from xpar.kernels.cpu.dense import DenseLinear, DenseRecord


class PackedDense(nn.Module):
    """Takes the place of an ``nn.Linear``; has no weight that could be read."""

    def __init__(self, linear: DenseLinear, outputs: int) -> None:
        super().__init__()
        self._linear, self._outputs = linear, outputs

    @property
    def nbytes(self) -> int:
        return self._linear.nbytes()

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] -> [..., N]."""
        rows = x.reshape(-1, x.shape[-1]).contiguous()
        return self._linear(rows).view(*x.shape[:-1], self._outputs)


class SlicedDense(nn.Module):
    """Takes the place of an ``nn.Linear``, of which this rank holds some columns; every rank of its node calls it together.

    ``linear``: the product with ``columns`` of the weight, None if there are none. ``number``: its place in the model.
    """

    def __init__(
        self,
        shared: SharedColumns,
        linear: DenseLinear | None,
        columns: slice,
        number: int,
        inputs: int,
        outputs: int,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self._shared, self._linear, self._columns = shared, linear, columns
        self._tag = Tag(f"dense product {number}")
        self._inputs, self._outputs, self._dtype = inputs, outputs, dtype

    @property
    def nbytes(self) -> int:
        return 0 if self._linear is None else self._linear.nbytes()

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] -> [..., N]."""
        rows = x.reshape(-1, self._inputs)
        return self._product(rows).view(*x.shape[:-1], self._outputs)

    def join(self) -> None:
        """Make this rank's columns of the other ranks' rows, without rows of one's own."""
        self._product(torch.empty(0, self._inputs, dtype=self._dtype))

    def _product(self, rows: Tensor) -> Tensor:
        return self._shared.product(rows, self._outputs, self._columns, self._compute, self._tag)

    def _compute(self, rows: Tensor) -> Tensor:
        assert self._linear is not None
        return self._linear(rows)


def ease(model: Any, record: DenseRecord, shared: SharedColumns | None = None) -> int:
    """Everything dense of ``model`` as this processor does it fastest; return how many bytes more that takes."""
    provide(model)
    return pack_dense(model, record, shared)


def pack_dense(model: Any, record: DenseRecord, shared: SharedColumns | None = None) -> int:
    """Pack the weights of ``model``'s attention, dense layers and head, one by one; return how many bytes more they take.

    ``shared``: the ranks that share out the products, of which each keeps its columns of every weight; None: all keep all.

    What has no memory yet is not dense: an expert layer takes its place. What routes tokens stays plain, bit by bit the model's own, and so does a head that is the embedding as well: rows of that are
    read, too, and a packed copy would be a second one.
    """
    # Names, not modules: a plain weight must be free before the next one is packed.
    return sum(_pack(model, name, record, shared, number) for number, name in enumerate(_packable(model)))


def _pack(model: Any, name: str, record: DenseRecord, shared: SharedColumns | None, number: int) -> int:
    module = model.get_submodule(name)
    before: int = sum(p.nbytes for p in module.parameters())
    weight = module.weight.detach()
    bias = None if module.bias is None else module.bias.detach()
    outputs, inputs = weight.shape
    packed: PackedDense | SlicedDense
    if shared is None:
        packed = PackedDense(record.build(weight, bias), outputs)
    else:
        part = columns_of(outputs, shared.group)
        some = part.start < part.stop
        # A copy, so that nothing keeps the whole bias.
        linear = record.build(weight[part], None if bias is None else bias[part].clone()) if some else None
        packed = SlicedDense(shared, linear, part, number, inputs, outputs, weight.dtype)
    model.set_submodule(name, packed)
    return packed.nbytes - before


def _packable(model: Any) -> list[str]:
    head = model.get_output_embeddings()
    uses = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    names = []
    for name, module in model.named_modules():
        parent = type(model.get_submodule(name.rpartition(".")[0])).__name__
        part = module is head or parent.endswith(("Attention", "MLP"))
        if part and type(module) is nn.Linear and uses[id(module.weight)] == 1 and not module.weight.is_meta:
            names.append(name)
    return names
