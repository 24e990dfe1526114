"""The peers of a measurement, in a process of their own with all threads of the node.

They need their own process because libraries remember how many threads they first ran with (zentorch does),
while this job's ranks have their share of the cores. The process sleeps while the ranks work.

One protocol serves both kinds of peers: the process sends a first value when it is ready, and then one
answer for each question. A ValueError in place of a value is raised where the question was asked.
"""

import multiprocessing
import time
from collections.abc import Callable
from itertools import pairwise
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from xpar.comm.communicator import SoloCommunicator
from xpar.comm.grid import GridShape, ProcessGrid
from xpar.comm.world import World
from xpar.engine.bench.ceilings import HostCeilings, measure_host_ceilings
from xpar.engine.bench.layer_request import LayerRequest
from xpar.engine.bench.peers import IMPLEMENTATIONS, block_function, transformers_layer
from xpar.engine.layer.build import build_layer
from xpar.engine.layer.options import LayerOptions
from xpar.engine.models.cache_argument import cache_argument
from xpar.engine.models.malloc import keep_freed_memory, peak_bytes

PREFILL = "grouped_mm"
"""transformers' experts for reading prompts: batched_mm copies the weights of every token's experts."""


class PeerProcess:
    """A process that runs ``serve(pipe, *args)``; the constructor waits for its ``first`` value.

    Raises RuntimeError for a process that ends or is late.
    """

    start_timeout_s = 600.0
    answer_timeout_s = 120.0

    def __init__(self, serve: Callable[..., None], *args: Any) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=serve, args=(theirs, *args), daemon=True)
        self._process.start()
        theirs.close()
        self.first = self._receive(self.start_timeout_s)

    def ask(self, *question: Any) -> Any:
        """Send ``question`` and wait for its answer."""
        self._pipe.send(question)
        return self._receive(self.answer_timeout_s)

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.join()

    def _receive(self, timeout: float) -> Any:
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


class LayerPeer(PeerProcess):
    """The peers of ``xpar bench layer``: transformers' layer, and this layer in one process."""

    def __init__(self, request: LayerRequest, threads: int) -> None:
        super().__init__(serve_layer, request, threads)
        self.ceilings: HostCeilings = self.first[0]
        self.names: list[str] = self.first[1]

    def seconds(self, name: str, tokens: int, number: int) -> float:
        """Measure how many seconds contender ``name`` takes for batch ``number``."""
        return float(self.ask("time", name, tokens, number))

    def output(self, name: str, tokens: int, number: int, rows: int) -> Tensor:
        """Compute the output [rows, H] float32 of ``name`` for the first rows of a batch."""
        return torch.tensor(self.ask("output", name, tokens, number, rows))


class DecodingPeer(PeerProcess):
    """The peer of ``xpar bench generate``: transformers' own model with all experts."""

    start_timeout_s = 1800.0  # loading a large model takes minutes
    answer_timeout_s = 600.0

    def __init__(self, path: Path, dtype: torch.dtype, threads: int, device: torch.device) -> None:
        super().__init__(serve_model, path, dtype, threads, device)
        self.peak_bytes = int(self.first)

    def decode(
        self, implementation: str, ids: Tensor, new_tokens: int
    ) -> tuple[float, list[float], list[list[int]], Tensor]:
        """Continue prompts ``ids`` [B, P] int64 greedily, by one of ``DECODE_IMPLEMENTATIONS``.

        Returns:
            Seconds of the prompts, seconds of each step after, tokens [B][new_tokens], and the logits [B, V]
            float32 behind the prompts.
        """
        prefill_s, step_s, tokens, logits = self.ask(implementation, ids.tolist(), new_tokens)
        return prefill_s, step_s, tokens, torch.from_numpy(logits)


def serve_layer(pipe: Connection, request: LayerRequest, threads: int) -> None:
    """Run the process of :class:`LayerPeer`: build the layers, then answer until killed."""
    keep_freed_memory()  # as the ranks do
    torch.set_num_threads(threads)
    ceilings = measure_host_ceilings(request.dtype)
    try:
        forwards = _build_forwards(request, threads)
    except (ValueError, ImportError) as error:
        pipe.send(ValueError(str(error)))
        return
    pipe.send((ceilings, list(forwards)))
    inputs: dict[tuple[int, int], Tensor] = {}
    while True:
        what, name, tokens, number, *rows = pipe.recv()
        key = (tokens, number)
        if key not in inputs:
            inputs[key] = request.draw_input(*key)
        if what == "output":
            pipe.send(forwards[name](inputs[key][: rows[0]]).float().numpy())
            continue
        begin = time.perf_counter()
        forwards[name](inputs[key])
        pipe.send(time.perf_counter() - begin)


def _build_forwards(request: LayerRequest, threads: int) -> dict[str, Callable[[Tensor], Tensor]]:
    """Build the peers that ``request.compare`` names: name -> forward [T, H] -> [T, H]."""
    weights = request.make_weights()
    forwards: dict[str, Callable[[Tensor], Tensor]] = {}
    if "solo" in request.compare:
        options = LayerOptions(kernel=request.kernel, exact=request.exact)
        forwards["solo"] = build_layer(
            weights.config, single_rank_grid(threads), request.dtype, weights.read, options
        )
    if "transformers" in request.compare:
        block = transformers_layer(request.shape.hf_config(request.scale), weights)
        forwards |= {name: block_function(block, name) for name in IMPLEMENTATIONS}
    return forwards


def serve_model(pipe: Connection, path: Path, dtype: torch.dtype, threads: int, device: torch.device) -> None:
    """Run the process of :class:`DecodingPeer`: load the model, then answer until killed."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    torch.set_num_threads(threads)
    logging.disable_progress_bar()
    try:
        model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype).eval().to(device)
    except (ValueError, OSError) as error:
        pipe.send(ValueError(str(error)))
        return
    pipe.send(peak_bytes())
    while True:
        implementation, ids, new_tokens = pipe.recv()
        pipe.send(_decode(model, implementation, torch.tensor(ids, device=device), new_tokens))


@torch.inference_mode()
def _decode(
    model: Any, implementation: str, ids: Tensor, new_tokens: int
) -> tuple[float, list[float], list[list[int]], Any]:
    """Decode greedily with the leanest loop around transformers' forward and its cache."""
    from transformers import DynamicCache

    model.set_experts_implementation(PREFILL)
    given = cache_argument(model, DynamicCache(config=model.config))
    begin = time.perf_counter()
    logits = model(ids, use_cache=True, logits_to_keep=1, **given).logits[:, -1].float()
    first, tokens = logits, [logits.argmax(-1)]
    times = [_now(ids.device)]
    model.set_experts_implementation(implementation)
    while len(tokens) < new_tokens:
        out = model(tokens[-1][:, None], use_cache=True, logits_to_keep=1, **given)
        tokens.append(out.logits[:, -1].float().argmax(-1))
        times.append(_now(ids.device))
    steps = [after - before for before, after in pairwise(times)]
    return times[0] - begin, steps, torch.stack(tokens, 1).tolist(), first.cpu().numpy()


def _now(device: torch.device) -> float:
    """Read the clock when all work of ``device`` is done: drawing a token waits for it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def single_rank_grid(threads: int) -> ProcessGrid:
    """Make the process grid of a process outside MPI, with ``threads`` threads."""
    alone = SoloCommunicator()
    world = World(alone, (0,), ("",), 0, 1, float(threads), "none", (0,))
    return ProcessGrid(
        world=world,
        shape=GridShape(1, 1, 1, 1, 1),
        tp=alone,
        dp=alone,
        ep=alone,
        etp=alone,
        edp=alone,
        moe=alone,
        node=alone,
        moe_node=alone,
    )
