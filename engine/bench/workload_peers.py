"""Other engines that answer a workload, each in a process of its own with all threads of the node."""

import json
import os
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from xpar.engine.bench.peer_process import PREFILL, PeerProcess
from xpar.engine.models.malloc import peak_bytes

CONTINUOUS, PADDED = "continuous batching", "padded batches"
PADDED_ROWS = 16
"""Prompts of a padded batch, of like lengths."""
FAR = 2.0
"""A way that takes this many times as long as the other one for a few prompts is not run for all."""
TRIAL_PROMPTS, TRIAL_TOKENS = 4, 4
PAGE = 256
"""Tokens of a block of transformers' cache, its default."""
Way = Callable[[list[list[int]], int], tuple[list[list[int]], float | None]]
"""Prompts and the tokens of each answer -> answers, and the seconds until the first was complete."""
VLLM_SCRIPT = Path(__file__).with_name("vllm_peer.py")


class WorkloadPeer(PeerProcess):
    """transformers' own model, by continuous batching and by padded batches."""

    start_timeout_s = 1800.0  # loading a large model takes minutes
    answer_timeout_s = 7200.0

    def __init__(self, path: Path, dtype: torch.dtype, threads: int, device: torch.device) -> None:
        super().__init__(serve, path, dtype, threads, device)

    def answer(
        self, prompts: Sequence[list[int]], new_tokens: int, batch_tokens: int
    ) -> tuple[dict[str, Any], list[str]]:
        """Answer greedily; return by way: seconds, first_s, answers and peak_bytes; and notes on the rest."""
        found: tuple[dict[str, Any], list[str]] = self.ask(list(prompts), new_tokens, batch_tokens)
        return found


def serve(pipe: Connection, path: Path, dtype: torch.dtype, threads: int, device: torch.device) -> None:
    """Run the process of :class:`WorkloadPeer`: load the model, then answer until killed."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    torch.set_num_threads(threads)
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype).eval().to(device)
        model.set_experts_implementation(PREFILL)
    except (ValueError, OSError) as error:
        pipe.send(ValueError(str(error)))
        return
    pipe.send(None)
    while True:
        pipe.send(_answer_by_contenders(model, *pipe.recv()))


def _answer_by_contenders(
    model: Any, prompts: list[list[int]], new_tokens: int, batch_tokens: int
) -> tuple[dict[str, Any], list[str]]:
    if model.device.type == "cpu":
        ways = {
            CONTINUOUS: lambda some, count: answer_continuously(model, some, count, batch_tokens),
            PADDED: lambda some, count: answer_padded(model, some, count),
        }
        return contend(ways, prompts, new_tokens)
    vocab = model.config.get_text_config().vocab_size

    def answer_warm(some: list[list[int]], count: int) -> tuple[list[list[int]], float | None]:
        return answer_continuously(model, some, count, batch_tokens, keeps=True)

    def close() -> None:
        model.destroy_cached_continuous_batching_manager()  # does nothing where none is kept

    return contend_on_gpu(
        answer_warm, close, lambda some, count: answer_padded(model, some, count), prompts, new_tokens, vocab
    )


def contend(
    ways: Mapping[str, Way], prompts: list[list[int]], new_tokens: int
) -> tuple[dict[str, Any], list[str]]:
    """Answer by each of ``ways`` that does not take much longer than the other one for a few prompts.

    Returns results by way, and notes on the rest.
    """
    trial, notes = prompts[:: max(1, len(prompts) // TRIAL_PROMPTS)][:TRIAL_PROMPTS], []
    seconds: dict[str, float] = {}
    for name, way in ways.items():
        try:
            for _ in range(2):  # the first call prepares
                seconds[name] = _timed(way, trial, min(new_tokens, TRIAL_TOKENS))["seconds"]
        except Exception as error:  # noqa: BLE001 - whatever a peer lacks here, the other way is measured
            seconds.pop(name, None)
            notes.append(_why_not(name, error))
    results = {}
    for name, trial_s in seconds.items():
        if trial_s > FAR * min(seconds.values()):
            few = (
                f"{len(trial)} prompts took {trial_s:.1f} s, and {min(seconds.values()):.1f} s the other way"
            )
            notes.append(f"transformers, {name}: left out: {few}")
            continue
        results[name] = _timed(ways[name], prompts, new_tokens)
    return results, notes


def contend_on_gpu(
    continuous: Way,
    close: Callable[[], None],
    padded: Way,
    prompts: list[list[int]],
    new_tokens: int,
    vocab: int,
) -> tuple[dict[str, Any], list[str]]:
    """Answer by continuous batching, and in padded batches unless those would take much longer.

    Kernels are compiled and graphs captured for the sizes that are met, which takes longer than prompts.
    So continuous batching answers as many prompts of the same lengths before, whose tokens are others: it
    keeps the beginnings that it knows. A whole batch of middle lengths says how long padded batches take.

    Args:
        continuous: Answers, and keeps what it has prepared.
        close: Gives that back.
        padded: Answers in padded batches.
        prompts: The token ids of all prompts.
        new_tokens: Tokens of each answer.
        vocab: The number of token ids.

    Returns:
        Results by way, and notes on the rest.
    """
    results: dict[str, Any] = {}
    notes = []
    try:
        continuous([[(token + 1) % vocab for token in ids] for ids in prompts], new_tokens)
        results[CONTINUOUS] = _timed(continuous, prompts, new_tokens)
    except Exception as error:  # noqa: BLE001 - whatever a peer lacks here, the other way is measured
        notes.append(_why_not(CONTINUOUS, error))
    try:
        close()
        trial = _middle_batch(prompts)
        for _ in range(2):  # the first call prepares
            trial_s = _timed(padded, trial, new_tokens)["seconds"]
        expected_s = trial_s * -(-len(prompts) // PADDED_ROWS)
        if CONTINUOUS in results and expected_s > FAR * results[CONTINUOUS]["seconds"]:
            other_s = results[CONTINUOUS]["seconds"]
            notes.append(
                f"transformers, {PADDED}: left out: {len(trial)} prompts took {trial_s:.1f} s, so that all "
                f"would take about {expected_s:.0f} s, and {other_s:.1f} s the other way"
            )
        else:
            results[PADDED] = _timed(padded, prompts, new_tokens)
    except Exception as error:  # noqa: BLE001 - as above
        notes.append(_why_not(PADDED, error))
    return results, notes


def _middle_batch(prompts: list[list[int]]) -> list[list[int]]:
    """Return the prompts of the middle one of the padded batches."""
    ordered = sorted(prompts, key=len)
    begin = max(0, (len(ordered) - PADDED_ROWS) // 2)
    return ordered[begin : begin + PADDED_ROWS]


def _timed(way: Way, prompts: list[list[int]], new_tokens: int) -> dict[str, Any]:
    begin = time.perf_counter()
    answers, first_s = way(prompts, new_tokens)
    return {
        "seconds": time.perf_counter() - begin,
        "first_s": first_s,
        "answers": answers,
        "peak_bytes": [peak_bytes()],
    }


def _why_not(name: str, error: Exception) -> str:
    return f"transformers, {name}: does not run here ({type(error).__name__}: {error})"


@torch.no_grad()  # it computes in a thread, which is in no inference mode
def answer_continuously(
    model: Any, prompts: list[list[int]], new_tokens: int, batch_tokens: int, keeps: bool = False
) -> tuple[list[list[int]], float | None]:
    """Answer with ``generate_batch``, with room for all prompts at once; returns answers and first_s.

    ``keeps``: leave the cache and the recorded graphs for another call with as much work.
    """
    from transformers import ContinuousBatchingConfig, GenerationConfig

    config = GenerationConfig(do_sample=False, max_new_tokens=new_tokens, eos_token_id=-1, pad_token_id=0)
    # By default the cache takes most of the memory that is free, of which ranks have some.
    blocks = sum(-(-(len(ids) + new_tokens) // PAGE) for ids in prompts)
    batching = ContinuousBatchingConfig(num_blocks=blocks + 1, max_batch_tokens=batch_tokens)
    begin = time.perf_counter()
    found = model.generate_batch(
        prompts,
        generation_config=config,
        continuous_batching_config=batching,
        record_timestamps=True,
        persistent_manager=keeps,
        warmup=model.device.type != "cpu",
    )
    outputs = list(found.values())
    errors = [output.error for output in outputs if output.error is not None]
    if errors or len(outputs) != len(prompts):
        raise RuntimeError(errors[0] if errors else f"{len(outputs)} answers to {len(prompts)} prompts")
    ends = [output.timestamps[-1] for output in outputs if output.timestamps]
    return [list(output.generated_tokens) for output in outputs], min(ends) - begin if ends else None


@torch.inference_mode()
def answer_padded(
    model: Any, prompts: list[list[int]], new_tokens: int
) -> tuple[list[list[int]], float | None]:
    """Answer with ``generate``, in batches padded on the left; returns answers and first_s."""
    from transformers import GenerationConfig

    config = GenerationConfig(
        do_sample=False, max_new_tokens=new_tokens, min_new_tokens=new_tokens, pad_token_id=0
    )
    begin, first_s = time.perf_counter(), None
    order = sorted(range(len(prompts)), key=lambda n: len(prompts[n]))
    answers: list[list[int]] = [[] for _ in prompts]
    for at in range(0, len(order), PADDED_ROWS):
        rows = order[at : at + PADDED_ROWS]
        width = max(len(prompts[n]) for n in rows)
        ids = torch.tensor([[0] * (width - len(prompts[n])) + prompts[n] for n in rows])
        mask = torch.tensor([[0] * (width - len(prompts[n])) + [1] * len(prompts[n]) for n in rows])
        device = model.device
        out = model.generate(ids.to(device), attention_mask=mask.to(device), generation_config=config)
        for n, tokens in zip(rows, out[:, width:].tolist(), strict=True):
            answers[n] = tokens
        first_s = time.perf_counter() - begin if first_s is None else first_s
    return answers, first_s


def answer_by_vllm(
    python: Path,
    checkpoint: Path,
    prompts: Sequence[list[int]],
    new_tokens: int,
    dtype: torch.dtype,
    threads: int,
    prefix_caching: bool = True,
) -> dict[str, Any]:
    """Answer greedily with the vLLM of the interpreter ``python``; returns what :class:`Answered` names.

    Raises:
        RuntimeError: The interpreter cannot be started, has no vLLM, or vLLM fails; with the last lines.
    """
    task = {
        "model": str(checkpoint),
        "prompts": list(prompts),
        "new_tokens": new_tokens,
        "dtype": str(dtype).removeprefix("torch."),
        "prefix_caching": prefix_caching,
        "trial": TRIAL_PROMPTS,
    }
    # vLLM must not take itself for a rank of this job.
    mpi = ("PMI", "OMPI_", "MPI", "HYDRA", "SLURM_", "PALS_", "FLUX_")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(mpi)}
    kept.pop("PYTHONHOME", None)
    with tempfile.TemporaryDirectory() as folder:
        given, taken = Path(folder) / "task.json", Path(folder) / "result.json"
        given.write_text(json.dumps(task))
        try:
            done = subprocess.run(
                [python, VLLM_SCRIPT, given, taken],
                env=kept | {"OMP_NUM_THREADS": str(threads)},
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                check=False,
            )
        except OSError as error:
            raise RuntimeError(
                f"--peer-python {python}: {error.strerror}; name a Python that has vLLM"
            ) from None
        if done.returncode or not taken.exists():
            last = "\n".join((done.stderr.strip() or done.stdout.strip()).splitlines()[-8:])
            raise RuntimeError(f"--peer-python {python}: vLLM ended with status {done.returncode}:\n{last}")
        result: dict[str, Any] = json.loads(taken.read_text())
        return result
