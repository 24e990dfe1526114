"""A step in n parts, so that the rows of one part travel while the experts compute another part."""

import torch
from torch import Tensor, nn

from xpar.comm.handshake import CollectiveError
from xpar.comm.partition import split_range
from xpar.engine.layer.runner import MoERunner, Step


class MicroBatches(nn.Module):
    """A layer that runs each step in ``count`` parts of its tokens.

    Every rank calls it together and gives the same ``count``. Part i + 1 is routed and on its way before part
    i is computed. Ranks may have any number of tokens, and parts may be empty.
    """

    def __init__(self, runner: MoERunner, count: int) -> None:
        super().__init__()
        if count < 1:
            raise ValueError(f"count={count}: a step has at least 1 part")
        dispatcher = runner.experts.dispatcher
        if count > 1 and not dispatcher.capabilities.pipelined:
            raise ValueError(
                f"the dispatcher {dispatcher.name} holds one step's rows at a time; use dispatcher='alltoall'"
            )
        self.runner, self.count = runner, count

    def forward(
        self, hidden_states: Tensor, router_logits: Tensor | None = None, input_ids: Tensor | None = None
    ) -> Tensor:
        """Compute ``[T, H]`` for ``[T, H]``, as :meth:`MoERunner.forward` does."""

        def start(part: int) -> Step:
            cut = split_range(hidden_states.shape[0], self.count, part)
            logits = None if router_logits is None else router_logits[cut]
            return self.runner.start(
                hidden_states[cut], logits, None if input_ids is None else input_ids[cut]
            )

        outputs = []
        step = start(0)
        for part in range(1, self.count):
            try:
                following = start(part)
            except CollectiveError:
                # All ranks raise alike. The rows of `step` are in flight, and their memory must outlive that.
                self.runner.complete(step)
                raise
            outputs.append(self.runner.complete(step).sum())
            step = following
        outputs.append(self.runner.complete(step).sum())
        return torch.cat(outputs)
