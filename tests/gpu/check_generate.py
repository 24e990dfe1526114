"""Check that recorded steps of whole models give what launched ones give, and what they save.

Needs GPUs, not part of the test run.

    python -m mpi4py tests/gpu/check_generate.py CHECKPOINT [CHECKPOINT ...] --json generate.json
    mpirun -n 2 python -m mpi4py tests/gpu/check_generate.py CHECKPOINT --batch 1 3 16 --json generate-2.json
    mpirun -n 2 python -m mpi4py tests/gpu/check_generate.py CHECKPOINT --batch 16 --ending
    mpirun -n 2 python -m mpi4py tests/gpu/check_generate.py CHECKPOINT --batch 1 16 --dispatcher allgather

Several ranks share out the sequences, so that a batch of 1 leaves all but one without any. Both sides are
given the same tokens, so that they stay comparable: logits in float32, times in the checkpoint's dtype. xpar
need not be installed: the rooms are taken from this checkout.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / ".typing")]

import torch
from torch import Tensor

from xpar.comm import ProcessGrid, World, run
from xpar.comm.partition import split_range
from xpar.comm.step_agreement import agree_step
from xpar.engine.generation.decode_batch import DecodeBatch
from xpar.engine.generation.recorder import PATIENCE, DecodeGraph
from xpar.engine.generation.running_sequence import RunningSequence, StopConditions
from xpar.engine.generation.sampling import Sampling
from xpar.engine.models.loaded_model import LoadedModel
from xpar.engine.models.loader import load_model
from xpar.engine.models.parallelize import SpreadOptions

STEPS = 150
"""More than there is room for in one recording."""
TOLERANCE = 1e-3
"""Relative, float32, median over the steps; the worst may be off where a router ties."""


@dataclass(frozen=True)
class Forced(Sampling):
    """Takes ``tokens`` [steps][B] in turn, whatever the logits say, and keeps those and the times.

    A sequence is known by the seed of its generator, its number among this rank's.
    """

    tokens: list[list[int]] = field(default_factory=list)
    seen: list[Tensor] = field(default_factory=list)
    at: list[float] = field(default_factory=list)

    def choose(self, logits: Tensor, generators: Any) -> list[int]:
        self.seen.append(logits.float().cpu())
        self.at.append(time.perf_counter())
        row = self.tokens[len(self.seen) - 1]
        return [row[generator.initial_seed()] for generator in generators]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoints", type=Path, nargs="+")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--whole-block", action="store_true", help="as for xpar generate")
    parser.add_argument("--dispatcher", default="auto", help="as for xpar generate")
    parser.add_argument("--ending", action="store_true", help="sequences end one after the other")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    options = SpreadOptions(whole_block=args.whole_block, dispatcher=args.dispatcher)
    torch.backends.cuda.matmul.allow_tf32 = False
    grid = ProcessGrid.create(World.attach(allow_singleton=True), device="cuda")
    rows = []
    for path in args.checkpoints:
        for batch in args.batch:
            rows.append(check(grid, path, batch, options, args.ending))
            say(grid, f"{rows[-1]}")
    right = [r["counted"] and r["logits_rel_error"] < TOLERANCE for r in rows]
    if args.json and grid.world.rank == 0:
        document = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "rows": rows}
        args.json.write_text(json.dumps(document, indent=2) + "\n")
    recorded = sum(r["recorded"] for r in rows)
    say(grid, f"{len(rows)} cases, {recorded} recorded, {right.count(False)} wrong")
    return int(not recorded or not all(right))


def check(grid: ProcessGrid, path: Path, batch: int, options: SpreadOptions, ending: bool) -> dict[str, Any]:
    """Both ways of one checkpoint and number of sequences; prompts of 1 to 40 tokens."""
    row: dict[str, Any] = {"checkpoint": path.name, "batch": batch, "whole_block": options.whole_block}
    for dtype in (torch.float32, None):
        loaded = load_model(path, grid, dtype, options)
        launched, expected = decode(grid, loaded, batch, None, ending)
        recorder = DecodeGraph.of(loaded)
        assert recorder is not None
        replayed, slots = decode(grid, loaded, batch, recorder, ending)
        if dtype is torch.float32:
            mine = [
                float((a - b).norm() / b.norm()) for a, b in zip(replayed.seen, launched.seen, strict=True)
            ]
            errors = [error for part in grid.world.comm.all_gather_object(mine) for error in part]
            row |= {"logits_rel_error": statistics.median(errors), "worst_step": max(errors)}
            row |= {
                "recorded": recorder.replayed > 0,
                "refused": recorder.refused,
                "counted": slots == expected,
            }
        else:
            mine = [step_ms(launched), step_ms(replayed)]
            launched_ms, replayed_ms = map(max, zip(*grid.world.comm.all_gather_object(mine), strict=True))
            times = {"launched": launched_ms, "replayed": replayed_ms}
            row |= {"step_ms": times, "ratio": round(times["launched"] / times["replayed"], 2)}
        del loaded, recorder
        torch.cuda.empty_cache()
    return row


def decode(
    grid: ProcessGrid, loaded: LoadedModel, batch: int, recorder: DecodeGraph | None, ending: bool
) -> tuple[Forced, int]:
    """One side; and how many (token, expert) pairs the layers counted, which a rehearsal must not add to."""
    draw, vocab = torch.Generator().manual_seed(batch), loaded.model.config.vocab_size
    comm = grid.world.comm
    mine = split_range(batch, comm.size, comm.rank)
    tokens = torch.randint(vocab, (STEPS + 1, batch), generator=draw).tolist()
    sampling = Forced(tokens=[row[mine] for row in tokens])
    sequences = DecodeBatch(loaded, sampling, StopConditions(STEPS + 1), recorder)
    before = loaded.slots()
    # Prompts of hybrids are read together only if they are equally long.
    step = 7 if loaded.is_cache_of_keys_and_values else 0
    prompts = [torch.randint(vocab, (1 + n * step % 40,), generator=draw).tolist() for n in range(batch)]
    new = [
        RunningSequence(n, ids, torch.Generator().manual_seed(n), stopped=stop_test(n, ending))
        for n, ids in enumerate(prompts[mine])
    ]
    for step in range(STEPS + 1):
        notes = (sequences.readiness(),)
        lengths = [len(r.ids) for r in new] or [0]
        tokens_now = sequences.next_tokens if step else sequences.tokens_of(lengths, continued=0)
        facts = agree_step(comm, step, tokens=tokens_now, work=sequences.occupied, notes=notes)
        sequences.agree(facts.tokens, tuple(note for (note,) in facts.notes if step) or (0,) * comm.size)
        if step == 0 and new:
            sequences.begin(new)
        elif sequences.occupied:
            sequences.advance()
        else:
            sequences.join()
    torch.cuda.synchronize()
    loaded.expect(None)
    return sampling, loaded.slots() - before


def stop_test(number: int, ending: bool) -> Callable[[Sequence[int]], bool]:
    """Return what ends a sequence; with ``ending`` each a little after the one before it."""
    return lambda answer: ending and len(answer) >= 2 * PATIENCE + 3 * number


def step_ms(side: Forced) -> float:
    """Median of the steps after a recording can have been made."""
    late = side.at[2 * PATIENCE :]
    return 0.0 if len(late) < 2 else round(statistics.median(b - a for a, b in pairwise(late)) * 1e3, 3)


def say(grid: ProcessGrid, text: str) -> None:
    if grid.world.rank == 0:
        sys.stdout.write(text + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(run(main))
