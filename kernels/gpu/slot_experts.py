"""The part that all expert kernels in Triton share: slots that are computed apart, then summed."""

from abc import ABC, abstractmethod
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton
from torch import Tensor

from xpar.kernels.contracts import ExpertInput, ExpertSpec, Slots, check_expert_weights, require_loaded
from xpar.kernels.gpu.rows import weighted_sum


class SlotExperts(ABC):
    """An expert kernel that computes every slot where it lies, and sums very small batches at once.

    Attributes:
        spec: the requirements of the layer.
    """

    spec: ExpertSpec
    _down: Tensor
    _missing: set[int]

    def compute(self, x: ExpertInput, out: Tensor | None = None) -> Tensor:
        require_loaded(self._missing)
        with self._device():
            if self.is_tiny(x):
                total = self._compute_tiny(x, out if out is not None and out.is_contiguous() else None)
                return total if out is None or out is total else out.copy_(total)
            slots = self._compute_all_slots(x)
            return weighted_sum(
                slots, x.topk_weights, x.topk_ids, out, in_place=True, dependent=self.has_dependent_launches
            )

    def compute_slots(self, x: ExpertInput) -> Tensor:
        require_loaded(self._missing)
        with self._device():
            return self._compute_all_slots(x)[x.topk_ids.reshape(-1) >= 0]

    def compute_unsummed(self, x: ExpertInput, exact: bool = False) -> Tensor | Slots:
        """See :class:`xpar.kernels.contracts.SlotKernel`."""
        require_loaded(self._missing)
        with self._device():
            return (
                self._compute_tiny(x, None)
                if self.is_tiny(x) and not exact
                else Slots(self._compute_all_slots(x))
            )

    @property
    def has_dependent_launches(self) -> bool:
        """True if a launch may begin before the one before it has ended."""
        return False

    @abstractmethod
    def is_tiny(self, x: ExpertInput) -> bool:
        """Return whether a batch is computed slot by slot, without sorting."""

    @abstractmethod
    def _compute_tiny(self, x: ExpertInput, out: Tensor | None) -> Tensor:
        """Return the weighted sums [M, H] of a batch that is tiny, in ``out`` if that is given."""

    @abstractmethod
    def _compute_all_slots(self, x: ExpertInput) -> Tensor:
        """Return each active slot's output [M k, H], unweighted; inactive rows are not written."""

    def _device(self) -> AbstractContextManager[object]:
        """Return a context with the weights' device as the current one, on which Triton launches."""
        on_gpu = self._down.is_cuda
        return torch.cuda.device(self._down.device) if on_gpu else nullcontext()

    def _activation(self) -> dict[str, Any]:
        a = self.spec.activation
        return {"GATED": a.gated, "NAME": a.name, "LIMIT": a.limit, "ALPHA": a.alpha, "BETA": a.beta}

    def _new(self, *shape: int) -> Tensor:
        return torch.empty(*shape, dtype=self.spec.dtype, device=self.spec.device)


class CodeExperts(SlotExperts):
    """Such a kernel of quantised weights: it takes codes and scales alone, and keeps biases in floats.

    The rows of both halves of its first product are rounded up to ``_width``.
    """

    _width: int
    _gate_up_bias: Tensor | None
    _down_bias: Tensor | None

    def load_expert(
        self,
        index: int,
        gate_up: Tensor,
        down: Tensor,
        gate_up_bias: Tensor | None = None,
        down_bias: Tensor | None = None,
    ) -> None:
        """Raise ValueError: this kernel takes codes; see :class:`xpar.kernels.contracts.QuantisedKernel`."""
        check_expert_weights(self.spec, index, gate_up, down, gate_up_bias, down_bias)

    def _load_biases(self, index: int, gate_up: Tensor | None, down: Tensor | None) -> None:
        width = self.spec.intermediate_size
        if self._gate_up_bias is not None and gate_up is not None:
            for half, part in enumerate(gate_up.split(width)):
                self._gate_up_bias[index, half * self._width :][:width].copy_(part)
        if self._down_bias is not None and down is not None:
            self._down_bias[index].copy_(down)


def use_device_allocator() -> None:
    """Give this thread's launches memory for the descriptors that kernels make on the device."""
    triton.set_allocator(_allocate)


def _allocate(size: int, alignment: int, stream: int | None) -> Tensor:
    return torch.empty(size, dtype=torch.int8, device="cuda")
