"""The dense products of a model from packed weights, which host processors read faster; the plain weights go.

M rows, K inputs, N outputs of a layer.
"""

from collections import Counter
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
    # Names, not modules: a plain weight must be free before the next one is packed.
    return sum(_pack(model, name, record) for name in _packable(model))


def _pack(model: Any, name: str, record: DenseRecord) -> int:
    module = model.get_submodule(name)
    before: int = sum(p.nbytes for p in module.parameters())
    bias = None if module.bias is None else module.bias.detach()
    packed = PackedDense(record.build(module.weight.detach(), bias), module.out_features)
    model.set_submodule(name, packed)
    return packed.nbytes - before


def _packable(model: Any) -> list[str]:
    head = model.get_output_embeddings()
    uses = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    names = []
    for name, module in model.named_modules():
        parent = type(model.get_submodule(name.rpartition(".")[0])).__name__
        part = module is head or parent.endswith(("Attention", "MLP"))
        if part and type(module) is nn.Linear and uses[id(module.weight)] == 1:
            names.append(name)
    return names
