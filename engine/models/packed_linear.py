"""Dense products of a model from packed weights, which host processors read faster.

K inputs, N outputs of a layer.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from xpar.comm.column_parallel import ColumnParallel, ColumnSlice, split_columns
from xpar.comm.communicator import Tag
from xpar.engine.models.attention import use_xpar_attention
from xpar.engine.models.lm_head import find_head
from xpar.kernels.cpu.linear import LinearEntry, LinearKernel


class PackedLinearModule(nn.Module):
    """A linear module with a packed weight, which cannot be read.

    ``weight``: an empty tensor; models ask for its dtype.
    """

    def __init__(self, linear: LinearKernel, outputs: int, dtype: torch.dtype) -> None:
        super().__init__()
        self._linear, self._outputs = linear, outputs
        self.weight = torch.empty(0, dtype=dtype)

    @property
    def nbytes(self) -> int:
        return self._linear.nbytes()

    def forward(self, x: Tensor) -> Tensor:
        """Compute [..., K] -> [..., N]."""
        rows = x.reshape(-1, x.shape[-1]).contiguous()
        return self._linear(rows).view(*x.shape[:-1], self._outputs)


class ColumnParallelLinear(nn.Module):
    """A linear module of which each rank of a node holds some columns; all call it together.

    ``linear``: the product with ``columns`` of the weight, None if there are none. ``number``: its place in
    the model. ``siblings``: those whose products are made with this one, see :func:`group_by_input`.
    ``weight``: as of :class:`PackedLinearModule`.
    """

    def __init__(
        self,
        column_parallel: ColumnParallel,
        linear: LinearKernel | None,
        columns: slice,
        number: int,
        inputs: int,
        outputs: int,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.column_parallel, self.number, self.inputs, self.dtype = column_parallel, number, inputs, dtype
        self.weight = torch.empty(0, dtype=dtype)
        self.siblings = SameInputGroup([self])
        self._linear, self._columns, self._outputs = linear, columns, outputs

    @property
    def nbytes(self) -> int:
        return 0 if self._linear is None else self._linear.nbytes()

    def share(self) -> ColumnSlice:
        """Return the product for :class:`~xpar.comm.column_parallel.ColumnParallel`."""
        return ColumnSlice(self._outputs, self._columns, self._compute)

    def forward(self, x: Tensor) -> Tensor:
        """Compute [..., K] -> [..., N]."""
        return self.siblings.product(self, x)

    def _compute(self, rows: Tensor) -> Tensor:
        assert self._linear is not None
        return self._linear(rows)


class SameInputGroup:
    """Products of one tensor that follow each other in a forward; the first makes all in one exchange."""

    def __init__(self, members: Sequence[ColumnParallelLinear]) -> None:
        self._members = members
        self._tag = Tag(f"dense product {members[0].number}")
        self._x: Tensor | None = None
        self._made: dict[int, Tensor] = {}

    def product(self, member: ColumnParallelLinear, x: Tensor) -> Tensor:
        """Compute [..., K] -> [..., N] of ``member``."""
        if member is self._members[0]:
            made = self._products(x.reshape(-1, member.inputs))
            self._x, self._made = x, {m.number: y for m, y in zip(self._members, made, strict=True)}
        elif x is not self._x or member.number not in self._made:
            # The other ranks do not know of it, and the guard ends what they wait for.
            raise RuntimeError(
                f"dense product {member.number}: its tensor is not the one of product "
                f"{self._members[0].number}, as in the "
                "forward when the model was loaded; load it with whole dense weights"
            )
        found = self._made.pop(member.number)
        if not self._made:
            self._x = None
        return found.view(*x.shape[:-1], -1)

    def join(self) -> None:
        """Make this rank's columns of the other ranks' rows, without any of this rank's own."""
        first = self._members[0]
        self._products(torch.empty(0, first.inputs, dtype=first.dtype))

    def _products(self, rows: Tensor) -> list[Tensor]:
        return self._members[0].column_parallel.products(rows, [m.share() for m in self._members], self._tag)


def group_by_input(calls: Sequence[tuple[nn.Module, Any]]) -> dict[ColumnParallelLinear, SameInputGroup]:
    """Group those of ``calls`` that share an input, so that one exchange makes their products.

    ``calls`` are modules and their inputs in a forward's order, the same on all ranks. Returns the first of
    each group and the group.
    """
    groups: list[list[ColumnParallelLinear]] = []
    last: Any = None
    for module, x in calls:
        if not isinstance(module, ColumnParallelLinear):
            last = None
            continue
        if x is not None and x is last:
            groups[-1].append(module)
        else:
            groups.append([module])
        last = x
    found = {}
    for group in groups:
        found[group[0]] = siblings = SameInputGroup(group)
        for member in group:
            member.siblings = siblings
    return found


def pack_model(model: Any, entry: LinearEntry, column_parallel: ColumnParallel | None = None) -> int:
    """Replace attention and dense products of ``model`` by faster ones; return the bytes that this adds."""
    use_xpar_attention(model)
    return pack_dense(model, entry, column_parallel)


def pack_dense(model: Any, entry: LinearEntry, column_parallel: ColumnParallel | None = None) -> int:
    """Pack the weights of ``model``'s attention, dense layers and head, one by one.

    Modules without memory are left out: an expert layer takes their place. Routers stay plain, bit by bit the
    model's own. So does a head that is also the embedding: its rows are read, and a packed copy would be a
    second one.

    ``column_parallel``: the ranks that slice the products, each of which keeps its columns of every weight;
    with None every rank keeps all. Returns the bytes that packing adds.
    """
    # Names, not modules: a plain weight must be free before the next one is packed.
    numbers = module_numbers(model)
    names = [name for name in packable(model) if not model.get_submodule(name).weight.is_meta]
    return sum(_pack(model, name, entry, column_parallel, numbers[name]) for name in names)


def _pack(
    model: Any, name: str, entry: LinearEntry, column_parallel: ColumnParallel | None, number: int
) -> int:
    module = model.get_submodule(name)
    before: int = sum(p.nbytes for p in module.parameters())
    weight = module.weight.detach()
    bias = None if module.bias is None else module.bias.detach()
    outputs, inputs = weight.shape

    def build(part: slice) -> LinearKernel:
        if part == slice(0, outputs):
            return entry.build(weight, bias)
        # A copy, so that nothing keeps the whole bias.
        return entry.build(weight[part], None if bias is None else bias[part].clone())

    return (
        place_product(model, name, build, (outputs, inputs), weight.dtype, column_parallel, number) - before
    )


def place_product(
    model: Any,
    name: str,
    build: Callable[[slice], LinearKernel],
    shape: tuple[int, int],
    dtype: torch.dtype,
    column_parallel: ColumnParallel | None,
    number: int,
) -> int:
    """Replace the linear module ``name`` of ``model`` by a packed one; return the bytes of its weights.

    Args:
        model: The model.
        name: The module's name.
        build: Packs the given columns of the product, of which there are some.
        shape: N and K.
        dtype: That of rows and results.
        column_parallel: The ranks that slice the product, or None.
        number: Its place in the model, see :func:`module_numbers`.
    """
    outputs, inputs = shape
    packed: PackedLinearModule | ColumnParallelLinear
    if column_parallel is None:
        packed = PackedLinearModule(build(slice(0, outputs)), outputs, dtype)
    else:
        part = split_columns(outputs, column_parallel.group)
        linear = build(part) if part.start < part.stop else None
        packed = ColumnParallelLinear(column_parallel, linear, part, number, inputs, outputs, dtype)
    model.set_submodule(name, packed)
    return packed.nbytes


def module_numbers(model: Any) -> dict[str, int]:
    """Number the modules of ``model`` by their place, which stays when a product is replaced."""
    return {name: number for number, (name, _) in enumerate(model.named_modules())}


def packable(model: Any) -> list[str]:
    """List the linear modules of attention, dense layers and head whose weights nothing else reads."""
    head = find_head(model)
    uses = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    names = []
    for name, module in model.named_modules():
        parent = type(model.get_submodule(name.rpartition(".")[0])).__name__
        part = module is head or parent.endswith(("Attention", "MLP"))
        if part and type(module) is nn.Linear and uses[id(module.weight)] == 1:
            names.append(name)
    return names
