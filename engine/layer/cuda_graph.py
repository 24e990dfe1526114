"""A layer captured as one CUDA graph, for steps whose launches cost more than their arithmetic."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from xpar.engine.layer.runner import MoERunner

WARM_UP = 3
"""Forwards before the capture: they compile kernels, open connections and size workspaces."""


class CapturedLayer:
    """The forward of ``runner`` for up to ``tokens`` tokens a rank, captured once and replayed; collective.

    Fewer tokens are padded with zeros, which are routed and computed like others and cut off again. Every
    rank replays in every step, a rank without tokens too. The ranks agree over MPI once, when the graph is
    captured: a rank that fails later is found by the transport's deadlines, not by the handshake of a step.
    Raises ValueError if the layer cannot be captured; the message says why.
    """

    def __init__(self, runner: MoERunner, tokens: int) -> None:
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
        """Replay for ``[T, H]``, T at most ``tokens``; the result is a view that the next call overwrites."""
        count = hidden_states.shape[0]
        if count > self.tokens or hidden_states.shape[1:] != self._input.shape[1:]:
            raise ValueError(
                f"hidden_states of shape {tuple(hidden_states.shape)}: recorded for at most {self.tokens} "
                "tokens of "
                f"width {self._input.shape[1]}; record a larger graph"
            )
        self._input[:count].copy_(hidden_states)
        self._input[count:].zero_()
        self._graph.replay()
        return self._output[:count]


def rehearse(forward: Callable[[], object], times: int, device: torch.device) -> None:
    """Call ``forward`` a few times on a side stream, as torch asks for before a capture."""
    side = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        for _ in range(times):
            forward()
    torch.cuda.current_stream(device).wait_stream(side)


def check_capturable(runner: MoERunner, tokens: int) -> None:
    """Raise ValueError with the reason why ``runner`` cannot be captured; every rank finds the same."""
    dispatcher = runner.experts.dispatcher
    alone = dispatcher.group.size == 1
    if tokens < 1:
        raise ValueError(f"tokens={tokens}: a graph is recorded for at least 1 token")
    if runner.grid.device.type != "cuda":
        raise ValueError(f"the layer computes on {runner.grid.device}: only a GPU's work can be recorded")
    if runner.options.exact and not dispatcher.capabilities.takes_slots:
        raise ValueError("exact mode waits for counts of the GPU, which a recorded graph cannot")
    if not alone and not dispatcher.capabilities.graph_capture:
        raise ValueError(
            f"the dispatcher {dispatcher.name} waits for counts of the GPU; use dispatcher='allgather', "
            "which does not"
        )
    transport = runner.grid.transport
    travels = dispatcher.capabilities.needs_transport or runner.grid.tp.size > 1
    if not alone and travels and transport is not None and transport.choice.name != "nccl":
        raise ValueError(
            f"rows travel through the host ({transport.choice.name}): only NCCL's transfers can be recorded"
        )


def is_capturable(runner: MoERunner, tokens: int) -> bool:
    """Return whether :class:`CapturedLayer` takes ``runner``; every rank finds the same."""
    try:
        check_capturable(runner, tokens)
    except ValueError:
        return False
    return True


def watch_paused(runner: MoERunner) -> AbstractContextManager[object]:
    """Pause the transport's watching thread, which must not ask about events during a capture."""
    transport = runner.grid.transport
    return nullcontext() if transport is None or transport.watch is None else transport.watch.paused()
