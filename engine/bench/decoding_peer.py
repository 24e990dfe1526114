"""transformers' own model with all experts, in a process of its own with all threads of the node, or on this rank's GPU.

Why a process of its own: see :mod:`xpar.engine.bench.peer_process`. It sleeps while the ranks work.
"""

import multiprocessing
import time
from itertools import pairwise
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

START_TIMEOUT_S = 1800.0
ANSWER_TIMEOUT_S = 600.0
IMPLEMENTATIONS = ("grouped_mm", "batched_mm", "eager")
"""transformers' ways to compute experts on any device."""
PREFILL = "grouped_mm"
"""Of the prompts: batched_mm copies the weights of every token's experts."""


class DecodingPeer:
    """Starts the process, waits until it has its model, and asks it for runs."""

    def __init__(self, path: Path, dtype: torch.dtype, threads: int, device: torch.device) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(
            target=serve, args=(theirs, path, dtype, threads, device), daemon=True
        )
        self._process.start()
        theirs.close()
        self.peak_bytes = int(self._answer(START_TIMEOUT_S))

    def decode(
        self, name: str, ids: Tensor, new_tokens: int
    ) -> tuple[float, list[float], list[list[int]], Tensor]:
        """Seconds of the prompts and of each token after, the tokens, and the logits behind the prompts."""
        self._pipe.send((name, ids.tolist(), new_tokens))
        prefill_s, step_s, tokens, logits = self._answer(ANSWER_TIMEOUT_S)
        return prefill_s, step_s, tokens, torch.from_numpy(logits)

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.join()

    def _answer(self, timeout: float) -> Any:
        if not self._pipe.poll(timeout):
            raise RuntimeError(f"the process of transformers has not answered for {timeout:g} s")
        try:
            answer = self._pipe.recv()
        except EOFError:
            raise RuntimeError(
                "the process of transformers ended: its message is above, or it ran out of memory"
            ) from None
        if isinstance(answer, ValueError):
            raise answer
        return answer


def serve(pipe: Connection, path: Path, dtype: torch.dtype, threads: int, device: torch.device) -> None:
    """The process: load, then answer until it is killed."""
    import resource

    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    torch.set_num_threads(threads)
    logging.disable_progress_bar()
    try:
        model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype).eval().to(device)
    except (ValueError, OSError) as error:
        pipe.send(ValueError(str(error)))
        return
    pipe.send(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
    while True:
        name, ids, new_tokens = pipe.recv()
        pipe.send(decode(model, name, torch.tensor(ids, device=device), new_tokens))


@torch.inference_mode()
def decode(
    model: Any, name: str, ids: Tensor, new_tokens: int
) -> tuple[float, list[float], list[list[int]], Any]:
    """The leanest loop around transformers' forward: greedy, its cache, nothing padded, nothing else of ``generate``."""
    from transformers import DynamicCache

    model.set_experts_implementation(PREFILL)
    cache, begin = DynamicCache(config=model.config), time.perf_counter()
    logits = model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1].float()
    first, tokens = logits, [logits.argmax(-1)]
    times = [_now(ids.device)]
    model.set_experts_implementation(name)
    while len(tokens) < new_tokens:
        out = model(tokens[-1][:, None], past_key_values=cache, use_cache=True, logits_to_keep=1)
        tokens.append(out.logits[:, -1].float().argmax(-1))
        times.append(_now(ids.device))
    steps = [after - before for before, after in pairwise(times)]
    return times[0] - begin, steps, torch.stack(tokens, 1).tolist(), first.cpu().numpy()


def _now(device: torch.device) -> float:
    """When all that was asked of ``device`` is done: whoever draws a token waits for it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
