"""A layer recorded as one CUDA graph: launching its kernels one by one costs more than few tokens' arithmetic."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from xpar.engine.layer.runner import MoERunner

WARM_UP = 3
"""Forwards before the recording: they compile kernels, open connections and size workspaces."""


class CapturedLayer:
    """``runner``'s forward for up to ``tokens`` tokens a rank, replayed; collective, as the forward is.

    Fewer tokens are padded with zeros, which are routed and computed like others and cut off again. Every rank replays
    in every step, one without tokens too. The ranks' agreement over MPI is made once, at the recording: a rank that
    fails later is found by the transport's deadlines, not by the step's handshake.
    """

    def __init__(self, runner: "MoERunner", tokens: int) -> None:
        check_capturable(runner, tokens)
        self.runner, self.tokens = runner, tokens
        shape = (tokens, runner.config.hidden_size)
        self._input = torch.zeros(shape, dtype=runner.dtype, device=runner.grid.device)
        rehearse(lambda: runner(self._input), WARM_UP, runner.grid.device)
        torch.cuda.synchronize(runner.grid.device)
        self._graph = torch.cuda.CUDAGraph()
        with watch_paused(runner), torch.cuda.graph(self._graph):
            self._output: Tensor = runner(self._input)

    def __call__(self, hidden_states: Tensor) -> Tensor:
        """[T, H] -> [T, H], T at most ``tokens``: a view of the graph's output, overwritten by the next call."""
        count = hidden_states.shape[0]
        if count > self.tokens or hidden_states.shape[1:] != self._input.shape[1:]:
            raise ValueError(
                f"hidden_states of shape {tuple(hidden_states.shape)}: recorded for at most {self.tokens} tokens of "
                f"width {self._input.shape[1]}; record a larger graph"
            )
        self._input[:count].copy_(hidden_states)
        self._input[count:].zero_()
        self._graph.replay()
        return self._output[:count]


def rehearse(forward: Callable[[], object], times: int, device: torch.device) -> None:
    """Call ``forward`` before it is recorded, on a stream of its own, as recording wants it."""
    side = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        for _ in range(times):
            forward()
    torch.cuda.current_stream(device).wait_stream(side)


def check_capturable(runner: "MoERunner", tokens: int) -> None:
    """Raise ValueError with the reason, from facts that every rank shares."""
    mover = runner.dispatcher
    alone = mover.group.size == 1
    if tokens < 1:
        raise ValueError(f"tokens={tokens}: a graph is recorded for at least 1 token")
    if runner.grid.device.type != "cuda":
        raise ValueError(f"the layer computes on {runner.grid.device}: only a GPU's work can be recorded")
    if runner.exact:
        raise ValueError("exact mode waits for counts of the GPU, which a recorded graph cannot")
    if not alone and not mover.capabilities.graph_capture:
        raise ValueError(
            f"the dispatcher {mover.name} waits for counts of the GPU; use dispatcher='allgather', which does not"
        )
    transport = runner.grid.transport
    if not alone and transport is not None and transport.choice.name != "nccl":
        raise ValueError(
            f"rows travel through the host ({transport.choice.name}): only NCCL's transfers can be recorded"
        )


def watch_paused(runner: "MoERunner") -> AbstractContextManager[object]:
    """The transport's watching thread must not ask about events while this one records."""
    transport = runner.grid.transport
    return nullcontext() if transport is None or transport.watch is None else transport.watch.paused()
