"""What kernels have in common that make the outputs of slots in expert order and then sum them by entry."""

from torch import Tensor

from xpar.kernels import rows
from xpar.kernels.contracts import ExpertInput


class SortedSlots:
    """The two ways to compute of :class:`~xpar.kernels.contracts.ExpertKernel`, from one."""

    def compute(self, x: ExpertInput, out: Tensor | None = None) -> Tensor:
        slot_rows, positions = self._sorted_slots(x)
        return rows.weighted_sum(slot_rows, x.topk_weights, positions, out)

    def compute_slots(self, x: ExpertInput) -> Tensor:
        slot_rows, positions = self._sorted_slots(x)
        return rows.active_rows(slot_rows, positions)

    def _sorted_slots(self, x: ExpertInput) -> tuple[Tensor, Tensor]:
        """Slot outputs in expert order, and where each slot of [M, k] is among them."""
        raise NotImplementedError
