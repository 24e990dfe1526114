"""The common part of kernels that compute slots in expert order, then sum each entry's."""

from torch import Tensor

from xpar.kernels.contracts import ExpertInput
from xpar.kernels.rows import active_rows, weighted_sum


class SortedSlots:
    """A base class with ``compute`` and ``compute_slots`` of expert kernels."""

    def compute(self, x: ExpertInput, out: Tensor | None = None) -> Tensor:
        slot_rows, positions = self._sorted_slots(x)
        return weighted_sum(slot_rows, x.topk_weights, positions, out)

    def compute_slots(self, x: ExpertInput) -> Tensor:
        slot_rows, positions = self._sorted_slots(x)
        return active_rows(slot_rows, positions)

    def _sorted_slots(self, x: ExpertInput) -> tuple[Tensor, Tensor]:
        """Return slot outputs [S, H] in expert order, and the row [M, k] of each slot, -1 for none."""
        raise NotImplementedError
