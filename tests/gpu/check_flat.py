"""Check flat batches on GPUs: torch's attention over spans, and recorded steps beside launched ones.

Needs GPUs, not part of the test run.

    python -m mpi4py tests/gpu/check_flat.py attention
    python -m mpi4py tests/gpu/check_flat.py CHECKPOINT [CHECKPOINT ...] --json flat.json
    mpirun -n 2 python -m mpi4py tests/gpu/check_flat.py CHECKPOINT --prompts 40

Attention is compared with its definition. Whole models answer random prompts that arrive and end at
different steps, with the same tokens on all sides: padded batches, flat ones launched, flat ones recorded.
xpar need not be installed: the rooms are taken from this checkout.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise, product
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / ".typing")]

import torch
from torch import Tensor

from xpar.comm import ProcessGrid, World, run
from xpar.engine.generation.decode_batch import DecodeBatch
from xpar.engine.generation.flat_batch import FlatBatch, FlatLimits
from xpar.engine.generation.flat_recorder import FlatRecorder
from xpar.engine.generation.lockstep import LockstepCallbacks, Progress, run_lockstep
from xpar.engine.generation.running_sequence import RunningSequence, StopConditions
from xpar.engine.generation.sampling import Sampling
from xpar.engine.models.flat_forward import flat_forms
from xpar.engine.models.loaded_model import LoadedModel
from xpar.engine.models.loader import load_model
from xpar.engine.models.parallelize import SpreadOptions
from xpar.engine.models.span_pool import SpanPool
from xpar.kernels.gpu.span_attention import SpanAttention, SpanRows, attend_by_definition

ATTENTION, MODEL = 6e-3, 4e-2
"""Largest relative errors in bfloat16: of attention, and of the logits of most steps."""
ROWS = 8


@dataclass(frozen=True)
class Forced(Sampling):
    """Takes tokens that depend on place and step alone, and keeps the logits of each."""

    vocab: int = 0
    seen: dict[tuple[int, int], Tensor] = field(default_factory=dict)

    def choose(self, logits: Tensor, generators: Any) -> list[int]:
        tokens = []
        for row, generator in zip(logits.float().cpu(), generators, strict=True):
            place = generator.initial_seed()
            step = sum(1 for known, _ in self.seen if known == place)
            self.seen[place, step] = row.clone()
            tokens.append((7 * place + 3 * step) % self.vocab)
        return tokens


def check_attention() -> bool:
    """Spans in any order, some with one new token and some with many; recorded, too."""
    right = True
    g = torch.Generator("cuda").manual_seed(torch.seed() % 2**31)
    shapes = product(((16, 16, 128), (32, 4, 64), (8, 8, 192), (6, 2, 256)), (None, 33), (False, True))
    for (hq, hk, d), window, sinks in shapes:
        for counts in ([1] * 9, [1, 70, 1, 300, 2]):
            lengths = [n + extra for n, extra in zip(counts, (0, 5, 700, 64, 1, 9, 128, 31, 2), strict=False)]
            order = torch.randperm(len(counts)).tolist()
            firsts, place = [0] * len(counts), 0
            for b in order:
                firsts[b], place = place, place + lengths[b] + 7
            pools = torch.randn(2, place, hk, d, generator=g, device="cuda").bfloat16()
            query = torch.randn(sum(counts), hq, d, generator=g, device="cuda").bfloat16()
            starts = torch.tensor([0, *counts]).cumsum(0)
            rows = SpanRows(
                starts.int().cuda(),
                torch.tensor([*firsts, 0]).int().cuda(),
                torch.tensor(lengths).int().cuda(),
                most_queries=max(counts),
                most_keys=place,
            )
            given = torch.randn(hq, generator=g, device="cuda").bfloat16() if sinks else None
            call = SpanAttention()

            def attend(call=call, query=query, pools=pools, rows=rows, d=d, window=window, given=given):
                return call(query, *pools, rows, d**-0.5, window, given)

            keys, values = pools.float()
            expected = attend_by_definition(query.float(), keys, values, rows, d**-0.5, window, given)
            attend()
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                recorded = attend()
            graph.replay()
            errors = [relative(found.float(), expected) for found in (attend(), recorded)]
            ok = all(error < ATTENTION for error in errors)
            right &= ok
            if not ok or (window, sinks) == (33, True):
                show(f"{'ok' if ok else 'WRONG'} {hq} {hk} {d} window {window} sinks {sinks}: {errors}")
    return right


def relative(found: Tensor, expected: Tensor) -> float:
    """||found - expected|| / ||expected||."""
    return float((found - expected).norm() / expected.norm())


def answer(
    grid: ProcessGrid, loaded: LoadedModel, prompts: int, make: Callable[[Sampling], Any]
) -> tuple[dict[tuple[int, int], Tensor], float]:
    """The logits by prompt and step of all ranks; and the median milliseconds of late steps."""
    vocab = loaded.model.config.get_text_config().vocab_size
    draw = torch.Generator().manual_seed(7)
    common = torch.randint(vocab, (150,), generator=draw).tolist()
    ids = [
        (common if n % 3 == 0 else []) + torch.randint(vocab, (1 + n * 37 % 230,), generator=draw).tolist()
        for n in range(prompts)
    ]
    wanted = [20 + n * 11 % 50 for n in range(prompts)]
    sampling = Forced(vocab=vocab)
    times: list[float] = []

    def start(place: int) -> RunningSequence:
        generator = torch.Generator().manual_seed(place)
        return RunningSequence(place, ids[place], generator, max_new_tokens=wanted[place])

    def note(_: Progress) -> None:
        times.append(time.perf_counter())

    job = LockstepCallbacks(
        total=prompts,
        start=start,
        length=lambda place: len(ids[place]),
        at_once=lambda place: 3,
        make_result=lambda r: {"place": r.place},
        write=lambda results: None,
        stop=lambda: False,
        report_progress=note,
    )
    batch = make(sampling)
    assert run_lockstep(grid.world.comm, batch, ROWS, job)
    torch.cuda.synchronize()
    seen: dict[tuple[int, int], Tensor] = {}
    for part in grid.world.comm.all_gather_object(sampling.seen):
        seen |= part
    steps = [b - a for a, b in pairwise(times)]
    return seen, statistics.median(steps) * 1e3


def check(grid: ProcessGrid, path: Path, prompts: int, options: SpreadOptions) -> dict[str, Any]:
    """All sides of one checkpoint, in bfloat16."""
    loaded = load_model(path, grid, torch.bfloat16, options)
    forms = flat_forms(loaded)
    if isinstance(forms, str):
        return {"checkpoint": path.name, "padded": forms}
    conditions, size = StopConditions(100), FlatLimits(ROWS, 300)
    recorders: list[FlatRecorder | None] = []

    def flat(records: bool) -> Callable[[Sampling], Any]:
        def make(sampling: Sampling) -> FlatBatch:
            pool = SpanPool(forms, 400, loaded.device, SpanAttention())
            recorders.append(FlatRecorder.of(loaded, pool) if records else None)
            return FlatBatch(loaded, sampling, conditions, pool, size, recorders[-1])

        return make

    before = loaded.slots()
    launched, launched_ms = answer(grid, loaded, prompts, flat(False))
    slots = loaded.slots() - before
    recorded, recorded_ms = answer(grid, loaded, prompts, flat(True))
    counted = loaded.slots() - before - slots
    padded, _ = answer(grid, loaded, prompts, lambda sampling: DecodeBatch(loaded, sampling, conditions))
    assert launched.keys() == recorded.keys() == padded.keys()
    recorder = recorders[-1]
    return {
        "checkpoint": path.name,
        "recorded": 0 if recorder is None else recorder.replayed,
        "refused": None if recorder is None else recorder.refused,
        "buckets": [] if recorder is None else sorted(recorder.recordings),
        "counted": slots == counted,
        "recorded beside launched": median(recorded, launched),
        "launched beside padded": median(launched, padded),
        "step_ms": {"launched": round(launched_ms, 3), "recorded": round(recorded_ms, 3)},
    }


def median(mine: dict[tuple[int, int], Tensor], theirs: dict[tuple[int, int], Tensor]) -> float:
    """The median of the relative errors of logits."""
    return statistics.median(relative(mine[key], theirs[key]) for key in theirs)


def show(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoints", nargs="+", help="attention, or checkpoints")
    parser.add_argument("--prompts", type=int, default=24)
    parser.add_argument("--dispatcher", default="auto", help="as for xpar generate")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if args.checkpoints == ["attention"]:
        return int(not check_attention())
    grid = ProcessGrid.create(World.attach(allow_singleton=True), device="cuda")
    options = SpreadOptions(dispatcher=args.dispatcher)
    rows = []
    for path in args.checkpoints:
        rows.append(check(grid, Path(path), args.prompts, options))
        if grid.world.rank == 0:
            show(f"{rows[-1]}")
    if args.json and grid.world.rank == 0:
        document = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "rows": rows}
        args.json.write_text(json.dumps(document, indent=2) + "\n")
    errors = ("recorded beside launched", "launched beside padded")
    bad = [
        r for r in rows if "padded" not in r
        and not (r["counted"] and r["recorded"] and all(r[name] < MODEL for name in errors))
    ]  # fmt: skip
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(run(main))
