"""The weights of MoE layers that are quantised while a checkpoint in floats is read."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from xpar.engine.architectures.layer_config import find, layer_config, require_moe_layers
from xpar.engine.architectures.schema import Architecture, MlpNames
from xpar.engine.architectures.stored_names import resolve_names
from xpar.engine.checkpoint.reader import Checkpoint, CheckpointError
from xpar.engine.formats.quantised_checkpoint import QuantisedCheckpoint, open_checkpoint
from xpar.engine.formats.quantised_on_load import Quantisation, QuantisedOnLoad, fit_format
from xpar.kernels.quantised_weight import WeightFormat


class WeightsToQuantise:
    """The tensors of ``checkpoint`` that are to be quantised, collected one MLP or product at a time."""

    def __init__(self, checkpoint: Checkpoint, quantisation: Quantisation) -> None:
        if isinstance(checkpoint, QuantisedCheckpoint):
            raise CheckpointError(
                f"{checkpoint.path}: its weights are quantised already; leave --quantize out, or give the "
                "release in bfloat16"
            )
        self.checkpoint, self.quantisation = checkpoint, quantisation
        self._experts: list[str] = []
        self._dense: list[str] = []
        self._transposed: set[str] = set()

    def add_experts(self, names: MlpNames, layer: int, experts: int) -> None:
        """Add all experts of a layer, unless their rows lie below each other in one matrix."""
        numbers = range(experts) if names.storage == "single" else range(1)
        if names.storage == "rows":
            return
        for expert in numbers:
            self._experts += self._mlp(names, layer, expert)

    def add_layer(self, arch: Architecture, layer: int) -> None:
        """Add the experts of a layer of the family ``arch``, and the shared ones if dense weights are."""
        names = resolve_names(self.checkpoint, arch, layer)
        self.add_experts(names.experts, layer, layer_config(arch, self.checkpoint.config, layer).num_experts)
        if names.shared is not None and self.quantisation.dense is not None:
            self._dense += self._mlp(names.shared.names, layer, 0)

    def add_dense(self, name: str) -> None:
        """Add the weight of a dense product, if dense weights are quantised."""
        if self.quantisation.dense is not None:
            self._dense.append(name)

    def formats(self) -> dict[str, WeightFormat]:
        """Map each tensor to its format; CheckpointError if there are no experts, or no group fits."""
        if not self._experts:
            raise CheckpointError(
                f"{self.checkpoint.path}: its experts cannot be quantised while they are read: they lie in "
                "one matrix, or transformers' conversion mixes them; leave --quantize out"
            )
        experts, dense = self.quantisation.experts, self.quantisation.dense
        found = dict.fromkeys(self._experts, fit_format(experts, self._widths(self._experts)))
        if dense is not None and self._dense:
            found |= dict.fromkeys(self._dense, fit_format(dense, self._widths(self._dense)))
        return found

    @property
    def experts(self) -> frozenset[str]:
        """The tensors of experts."""
        return frozenset(self._experts)

    @property
    def transposed(self) -> frozenset[str]:
        """The tensors that are stored inputs first."""
        return frozenset(self._transposed)

    def open(self) -> QuantisedOnLoad:
        """Return the checkpoint whose readers get these tensors quantised."""
        return QuantisedOnLoad(self.checkpoint, self.formats(), self._transposed)

    def _mlp(self, names: MlpNames, layer: int, expert: int) -> Iterator[str]:
        up, down = names.up_transposed, names.down_transposed
        for name, flipped in ((names.gate, up), (names.up, up), (names.gate_up, up), (names.down, down)):
            if name is not None:
                full = name.format(layer=layer, expert=expert)
                if flipped:
                    self._transposed.add(full)
                yield full

    def _widths(self, names: Iterable[str]) -> set[int]:
        shapes = ((name, self.checkpoint.entry(name).shape) for name in names)
        return {shape[-2] if name in self._transposed else shape[-1] for name, shape in shapes}


@contextmanager
def open_layers(path: str | Path, quantisation: Quantisation | None) -> Iterator[Checkpoint]:
    """Open a checkpoint whose MoE layers are read; with ``quantisation`` they are quantised meanwhile."""
    with open_checkpoint(path) as checkpoint:
        if quantisation is None:
            yield checkpoint
            return
        weights = WeightsToQuantise(checkpoint, quantisation)
        arch = find(checkpoint.config)
        for layer in require_moe_layers(arch, checkpoint.config):
            weights.add_layer(arch, layer)
        yield weights.open()
