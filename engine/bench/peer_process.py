"""The other contenders, in a process of their own with all threads of the node.

A process of their own because libraries remember how many threads they first ran with (zentorch does), while this
job's ranks have their share of the cores. The process sleeps while the ranks work.
"""

import multiprocessing
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch import Tensor

from xpar.comm.grid import ProcessGrid
from xpar.engine.bench.ceilings import Ceilings, measure_ceilings
from xpar.engine.bench.peers import IMPLEMENTATIONS, caller, transformers_layer
from xpar.engine.bench.request import Request
from xpar.engine.layer.build import build_layer
from xpar.engine.layer.options import LayerOptions
from xpar.engine.models.malloc import keep_freed_memory

START_TIMEOUT_S = 600.0


class PeerProcess:
    """Starts the process, waits until it has its weights, and asks it for runs."""

    def __init__(self, request: Request, threads: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=serve, args=(theirs, request, threads), daemon=True)
        self._process.start()
        theirs.close()
        self.ceilings, self.names = self._started()

    def seconds(self, name: str, tokens: int, number: int) -> float:
        """How long contender ``name`` took for batch ``number``."""
        self._pipe.send(("time", name, tokens, number))
        return float(self._answer())

    def output(self, name: str, tokens: int, number: int, rows: int) -> Tensor:
        """[rows, H]: its output for the first rows of that batch, as float32."""
        self._pipe.send(("output", name, tokens, number, rows))
        return torch.tensor(self._answer())

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.join()

    def _started(self) -> tuple[Ceilings, list[str]]:
        ceilings, names = self._answer(START_TIMEOUT_S)
        return ceilings, names

    def _answer(self, timeout: float = 120.0) -> Any:
        if not self._pipe.poll(timeout):
            raise RuntimeError(f"the process of the peers has not answered for {timeout:g} s")
        try:
            answer = self._pipe.recv()
        except EOFError:
            raise RuntimeError(
                "the process of the peers ended: its message is above, or it ran out of memory"
            ) from None
        if isinstance(answer, ValueError):
            raise answer
        return answer


def serve(pipe: Connection, request: Request, threads: int) -> None:
    """The process: build, then answer until it is killed."""
    keep_freed_memory()  # as the ranks do
    torch.set_num_threads(threads)
    ceilings = measure_ceilings(request.dtype)
    try:
        calls = contenders(request, threads)
    except (ValueError, ImportError) as error:
        pipe.send(ValueError(str(error)))
        return
    pipe.send((ceilings, list(calls)))
    inputs: dict[tuple[int, int], Tensor] = {}
    while True:
        what, name, tokens, number, *rows = pipe.recv()
        key = (tokens, number)
        if key not in inputs:
            inputs[key] = request.input(*key)
        if what == "output":
            pipe.send(calls[name](inputs[key][: rows[0]]).float().numpy())
            continue
        begin = time.perf_counter()
        calls[name](inputs[key])
        pipe.send(time.perf_counter() - begin)


def contenders(request: Request, threads: int) -> dict[str, Callable[[Tensor], Tensor]]:
    """What ``request.compare`` names, with weights in place."""
    weights = request.weights()
    calls: dict[str, Callable[[Tensor], Tensor]] = {}
    if "solo" in request.compare:
        options = LayerOptions(kernel=request.kernel, exact=request.exact)
        calls["solo"] = build_layer(
            weights.config, ProcessGrid.single(threads), request.dtype, weights.read, options
        )
    if "transformers" in request.compare:
        block = transformers_layer(request.shape.hf_config(request.scale), weights)
        calls |= {name: caller(block, name) for name in IMPLEMENTATIONS}
    return calls
