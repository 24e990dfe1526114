"""A step in n parts, so that the rows of one travel while the experts compute another's."""

from collections.abc import Generator

import torch
from torch import Tensor, nn

from xpar.comm.handshake import CollectiveError
from xpar.comm.partition import split_range
from xpar.engine.layer.output import LayerOutput, rest_of
from xpar.engine.layer.runner import MoERunner


class MicroBatches(nn.Module):
    """``runner`` in ``count`` parts of its tokens; every rank calls it together and gives the same ``count``.

    Part i + 1 is routed and on its way before part i is computed. Ranks may have any number of tokens, parts none.
    """

    def __init__(self, runner: MoERunner, count: int) -> None:
        super().__init__()
        if count < 1:
            raise ValueError(f"count={count}: a step has at least 1 part")
        mover = runner.dispatcher
        if count > 1 and not mover.capabilities.pipelined:
            raise ValueError(
                f"the dispatcher {mover.name} holds one step's rows at a time; use dispatcher='alltoall'"
            )
        self.runner, self.count = runner, count

    def forward(
        self, hidden_states: Tensor, router_logits: Tensor | None = None, input_ids: Tensor | None = None
    ) -> Tensor:
        """[T, H] -> [T, H], as :meth:`MoERunner.forward`."""
        cuts = [split_range(hidden_states.shape[0], self.count, part) for part in range(self.count)]
        parts = [
            self.runner.stepwise(
                hidden_states[cut],
                None if router_logits is None else router_logits[cut],
                None if input_ids is None else input_ids[cut],
            )
            for cut in cuts
        ]
        next(parts[0])
        outputs = []
        for part, following in zip(parts, [*parts[1:], None], strict=True):
            if following is not None:
                self._start(following, part)
            outputs.append(rest_of(part).sum())
        return torch.cat(outputs)

    def _start(
        self, following: Generator[None, None, LayerOutput], part: Generator[None, None, LayerOutput]
    ) -> None:
        """Send ``following`` on its way; where it cannot go, on all ranks alike, ``part`` still arrives before the error.

        Its rows are in flight, and their memory must outlive that.
        """
        try:
            next(following)
        except CollectiveError:
            rest_of(part)
            raise
