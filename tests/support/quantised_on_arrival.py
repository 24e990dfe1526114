"""Layers whose rows travel as numbers and become codes where they arrive, beside those that send codes."""

from dataclasses import dataclass, replace

from torch import Tensor

from xpar.comm.communicator import Pending
from xpar.comm.dispatch.base import DispatchPlan
from xpar.engine.layer.expert_shard import ExpertShard
from xpar.engine.layer.runner import MoERunner
from xpar.kernels.contracts import ExpertInput, Slots
from xpar.kernels.rows import encode_rows


@dataclass(frozen=True)
class QuantisedOnArrival(ExpertShard):
    """Experts whose rows travel as they are, and become codes where they arrive."""

    def dispatch(self, rows: Tensor, plan: DispatchPlan) -> Pending[ExpertInput]:
        return self.dispatcher.dispatch(rows, plan)

    def compute(self, arrived: ExpertInput, plan: DispatchPlan) -> Tensor | Slots:
        assert self.row_format is not None
        words = encode_rows(arrived.hidden_states.contiguous(), self.row_format)
        return super().compute(replace(arrived, hidden_states=words, row_format=self.row_format), plan)


def on_arrival(runner: MoERunner) -> MoERunner:
    """Change ``runner``, whose rows then travel as numbers."""
    runner.dispatcher.row_bytes = None
    runner.experts = QuantisedOnArrival(**vars(runner.experts))
    return runner
