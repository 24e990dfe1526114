"""The dense products of a model from packed weights, which host processors read faster; the plain weights go.

M rows, K inputs, N outputs of a layer.
"""

from collections import Counter
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

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


def ease(model: Any, record: DenseRecord) -> int:
    """Everything dense of ``model`` as this processor does it fastest; return how many bytes more that takes."""
    provide(model)
    return pack_dense(model, record)


def pack_dense(model: Any, record: DenseRecord) -> int:
    """Pack the weights of ``model``'s attention, dense layers and head, one by one; return how many bytes more they take.

    What routes tokens stays plain, bit by bit the model's own, and so does a head that is the embedding as well: rows of that are
    read, too, and a packed copy would be a second one.
    """
    uses = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    more = 0
    for name, module in list(_packable(model)):
        if uses[id(module.weight)] > 1:
            continue
        before = sum(p.nbytes for p in module.parameters())
        linear = record.build(module.weight.detach(), None if module.bias is None else module.bias.detach())
        packed = PackedDense(linear, module.out_features)
        model.set_submodule(name, packed)
        more += packed.nbytes - before
    return more


def _packable(model: Any) -> Iterator[tuple[str, nn.Linear]]:
    head = model.get_output_embeddings()
    for name, module in model.named_modules():
        parent = type(model.get_submodule(name.rpartition(".")[0])).__name__
        if type(module) is nn.Linear and (module is head or parent.endswith(("Attention", "MLP"))):
            yield name, module
