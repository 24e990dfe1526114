"""The host's time of a decoding step of flat batches on GPUs, beside the forward, which a stand-in takes.

Planning, agreeing, the numbers of a step, the choice of tokens, stops, answers. It needs no GPU::

    xpar make-checkpoint olmoe tiny --layers 16 --hidden 64
    python benchmarks/host_step.py tiny --rows 256 512
"""

import argparse
import cProfile
import pstats
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest.mock import patch

import torch
from torch import Tensor

from xpar.comm import ProcessGrid, World
from xpar.engine.bench.workload import _read_answers, _work_of, request_of
from xpar.engine.generation import generate as generation
from xpar.engine.generation.answer_file import open_answer_file
from xpar.engine.generation.decode_graph import FixedStep
from xpar.engine.generation.flat_batch import FlatBatch, FlatLimits
from xpar.engine.generation.flat_recorder import FlatRecorder
from xpar.engine.generation.kv_memory import BatchRoom, choose_blocks
from xpar.engine.generation.lockstep import Progress
from xpar.engine.generation.running_sequence import StopConditions
from xpar.engine.generation.sampling import Sampling
from xpar.engine.generation.tokenizer import Tokenizer
from xpar.engine.models.flat_forward import flat_forms
from xpar.engine.models.kv_pool import FlatTokens
from xpar.engine.models.loaded_model import LoadedModel
from xpar.engine.models.loader import load_model
from xpar.engine.models.span_pool import SpanPool
from xpar.kernels.gpu.span_attention import SpanAttention

VOCABULARY = 64
"""Columns of the stand-in's logits: on a GPU the choice among all is not the host's."""
LONGEST = 542
"""Tokens of a prompt."""


class StandInRows:
    """Logits of any number of rows, the same for each step."""

    def __init__(self, seed: int) -> None:
        self._logits = torch.rand(2048, VOCABULARY, generator=torch.Generator().manual_seed(seed))

    def forward(self, tokens: FlatTokens) -> Tensor:
        return self._logits[: len(tokens.wanted)]

    def record(self, step: FixedStep) -> Callable[[], Tensor]:
        rows = step.rows  # type: ignore[attr-defined] # a step of flat batches has them
        return lambda: self._logits[:rows]


def make_batch(
    made: list[FlatBatch],
    loaded: LoadedModel,
    sampling: Sampling,
    conditions: StopConditions,
    *,
    room: BatchRoom,
) -> FlatBatch:
    """Make a batch as on a GPU, but with a stand-in for the forward; add it to ``made``."""
    forms = flat_forms(loaded)
    assert not isinstance(forms, str), forms
    blocks = choose_blocks(forms, room, 2**62)
    pool = SpanPool(forms, blocks, torch.device("cpu"), SpanAttention("definition"))
    rows = StandInRows(0)
    size = FlatLimits(room.most_rows, room.prefill_tokens, room.shares_prefixes)
    batch = FlatBatch(loaded, sampling, conditions, pool, size, FlatRecorder(loaded, pool, rows.record))
    batch._forward = rows.forward  # type: ignore[assignment]
    made.append(batch)
    return batch


class Clock:
    """The seconds between agreements, and in them, with the tokens drawn by then."""

    def __init__(self) -> None:
        self.polls: list[float] = []
        self.begins: list[tuple[float, int]] = []

    def poll(self) -> bool:
        self.polls.append(time.perf_counter())
        return False

    def note(self, progress: Progress) -> None:
        self.begins.append((time.perf_counter(), progress.tokens))


def measure(
    world: World, loaded: LoadedModel, tokenizer: Tokenizer, path: Path, rows: int, args: argparse.Namespace
) -> dict[str, float]:
    """Answer prompts of up to LONGEST tokens, ``rows`` at a time; return milliseconds of its steps."""
    draw = torch.Generator().manual_seed(1)
    lengths = torch.randint(16, LONGEST, (args.prompts,), generator=draw).tolist()
    prompts = [torch.randint(3, VOCABULARY, (n,), generator=draw).tolist() for n in lengths]
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "answers.jsonl"
        open_answer_file(out, [])
        request = request_of(path, args.new_tokens, rows, args.prefill_tokens, torch.float32, False)
        request = replace(request, out=out)
        clock, made = Clock(), list[FlatBatch]()
        begin = time.perf_counter()
        with patch.object(generation, "choose_batch", partial(make_batch, made)):
            generation.generate(
                world.comm, request, _work_of(prompts), tokenizer, loaded, clock.poll, clock.note
            )
        whole = time.perf_counter() - begin
        assert len(_read_answers(out)) == args.prompts
    steps = zip(clock.polls, clock.polls[1:], clock.begins, clock.begins[1:], strict=False)
    found = [(after - at, b - at, n - m) for at, after, (b, m), (_, n) in steps]
    most = max(drawn for _, _, drawn in found)
    full = [(step, agree) for step, agree, drawn in found if drawn == most]
    middle = full[len(full) // 2 :]  # those before may read
    recorder = made[-1].recorder
    assert recorder is not None
    return {
        "rows": most,
        "steps": len(found) + 1,
        "replayed": recorder.replayed,
        "recordings": len(recorder.recordings),
        "ms a full step": 1e3 * statistics.median(step for step, _ in middle),
        "agreeing": 1e3 * statistics.median(agree for _, agree in middle),
        "longest": 1e3 * max(step for step, _, _ in found),
        "all": 1e3 * whole,
    }


def main(words: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--rows", nargs="+", type=int, default=[256, 512])
    parser.add_argument("--prompts", type=int, default=512)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--prefill-tokens", type=int, default=4096)
    parser.add_argument("--profile", action="store_true", help="print where the time goes")
    args = parser.parse_args(words)
    torch.set_num_threads(1)
    world = World.attach()
    grid = ProcessGrid.create(world)
    loaded = load_model(args.checkpoint, grid)
    tokenizer = Tokenizer(args.checkpoint)
    tokenizer.ends = frozenset()
    for rows in args.rows:
        profile = cProfile.Profile()
        if args.profile:
            profile.enable()
        found = measure(world, loaded, tokenizer, args.checkpoint, rows, args)
        profile.disable()
        sys.stdout.write(f"{rows}: {', '.join(f'{name} {number:.4g}' for name, number in found.items())}\n")
        if args.profile:
            pstats.Stats(profile, stream=sys.stdout).sort_stats("tottime").print_stats(30)


if __name__ == "__main__":
    main()
