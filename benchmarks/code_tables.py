"""Search the launch parameters of a GPU's kernels of quantised weights: ``python benchmarks/code_tables.py
--models gpt-oss --formats mxfp4 int4-128 --tokens 1 16 64 257 1024 --json tables.json``.

Needs one GPU; from the repository's root, with xpar importable. Every trial is compiled beforehand by
processes of their own, then compared with the dequantised weights in float64, then timed product by product.
The best products of a cell (layer, format, tokens) are put together and timed in turn with the present table
and with xpar's bfloat16 kernels.
"""

import argparse
import copy
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "support"))

import torch
from code_trials import Trial, trials
from torch import Tensor

from xpar.engine.bench.kernels.cases import LAYERS, random_inputs
from xpar.engine.bench.kernels.formats import (
    FORMATS,
    WEIGHTS_ALONE,
    CodedLayer,
    contenders,
    draw_layer,
    expected_rows,
    load_coded,
)
from xpar.engine.bench.timing import graph_time, times_in_turn
from xpar.kernels.contracts import ExpertInput
from xpar.kernels.gpu.tile_tables import Machine

DTYPE = torch.bfloat16
SAMPLE = 8  # tokens whose outputs are compared
REPEATS = 3  # times that each input goes through each trial
STAGES = ("gate_up", "down")


@dataclass(frozen=True)
class Job:
    """A batch of one layer, to compile for a machine that workers do not touch.

    ``format``: None for bfloat16. ``trial``: None for the present table.
    """

    model: str
    format: str | None
    machine: Machine
    trial: Trial | None
    tokens: int


def kernel_to_compile(job: Job) -> Any:
    """Return the job's kernel without memory."""
    from xpar.kernels.gpu.experts import TritonExperts
    from xpar.kernels.gpu.nibble_experts import NibbleExperts
    from xpar.kernels.gpu.quantised_experts import QuantisedExperts

    spec = LAYERS[job.model].spec(DTYPE, "meta")
    if job.format is None:
        return TritonExperts(spec, None, job.machine)
    coding = FORMATS[job.format]
    spec = replace(spec, weight_format=coding.weight, activation_scheme=coding.scheme)
    kernel: Any = (NibbleExperts if coding.weight.code.is_nibble else QuantisedExperts)(
        spec, None, job.machine
    )
    return kernel if job.trial is None else with_table(kernel, job.trial)


def compile_job(job: Job) -> str | None:
    """Compile a trial's kernels into Triton's cache; return the reason why that is not possible."""
    from triton_compiler import compiling

    layer = LAYERS[job.model]
    try:
        kernel = kernel_to_compile(job)
        kernel._missing.clear()
        x = ExpertInput(
            torch.empty(job.tokens, layer.hidden, dtype=DTYPE, device="meta"),
            torch.empty(job.tokens, layer.top_k, dtype=torch.int32, device="meta"),
            torch.empty(job.tokens, layer.top_k, device="meta"),
        )
        major, minor = job.machine.capability
        with compiling(10 * major + minor):
            kernel.compute(x)
    except Exception as why:  # noqa: BLE001 - one trial must not end the search
        return f"{type(why).__name__}: {str(why)[:160]}"
    return None


def compile_all(jobs: Sequence[Job], say: Any) -> None:
    """Compile in as many processes as there are processors."""
    workers = max(1, min(len(jobs), (os.cpu_count() or 2) - 1))
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        for job, why in zip(jobs, pool.map(compile_job, jobs), strict=True):
            if why:
                say(f"  does not compile: {job.format} {job.trial}: {why}")


def with_table(kernel: Any, trial: Trial) -> Any:
    """Return a kernel with the same weights and the trial's table."""
    other = copy.copy(kernel)
    other.table = trial.change(kernel.table)
    return other


def error(got: Tensor, expected: Tensor) -> float:
    return float((got.double() - expected).norm() / expected.norm())


def find_sound(
    kernel: Any, found: Iterable[Trial], x: ExpertInput, expected: Tensor, bar: float, say: Any
) -> list[Trial]:
    """Return the trials that run here and give the right result."""
    sound = []
    for trial in found:
        try:
            off = error(with_table(kernel, trial).compute(x)[: len(expected)], expected)
        except Exception as why:  # noqa: BLE001 - as above
            say(f"  left out: {trial}: {type(why).__name__}: {str(why)[:160]}")
            continue
        if off <= bar:
            sound.append(trial)
        else:
            say(f"  WRONG: {trial}: relative error {off:.1e}")
    return sound


def stage_times(kernel: Any, found: list[Trial], inputs: list[ExpertInput]) -> dict[Trial, dict[str, float]]:
    """Return the median seconds of each product of each trial, and of all other kernels of a call."""
    from torch.autograd.profiler_util import DeviceType
    from torch.profiler import ProfilerActivity, profile

    kernels = [with_table(kernel, trial) for trial in found]
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for other in kernels:
            for x in inputs * REPEATS:
                other.compute(x)
            torch.cuda.synchronize()
    events = [e for e in profiler.events() or () if e.device_type == DeviceType.CUDA]
    events.sort(key=lambda event: event.time_range.start)
    calls, result = len(inputs) * REPEATS, {}
    for trial in found:
        # A call ends with its down product, but for the weighted sum, which counts with the next call.
        own: dict[str, list[float]] = {stage: [] for stage in STAGES}
        rest = 0.0
        while events and len(own["down"]) < calls:
            event = events.pop(0)
            stage = next((s for s in STAGES if event.name.startswith(s)), None)
            seconds = event.time_range.elapsed_us() * 1e-6
            if stage is None:
                rest += seconds
            else:
                own[stage].append(seconds)
        if len(own["gate_up"]) != calls:
            raise RuntimeError(f"{trial}: {len(own['gate_up'])} of {calls} products were seen")
        result[trial] = {stage: statistics.median(own[stage]) for stage in STAGES} | {"rest": rest / calls}
    return result


def layer_times(kernel: Any, found: list[Trial], inputs: list[ExpertInput]) -> dict[Trial, dict[str, float]]:
    """Return half of the seconds of a layer for both products of each trial."""
    result = {}
    for trial in found:
        half = graph_time([partial(with_table(kernel, trial).compute, x) for x in inputs], 0.03) / 2
        result[trial] = {"gate_up": half, "down": half, "rest": 0.0}
    return result


def put_together(times: dict[Trial, dict[str, float]]) -> list[tuple[float, Trial]]:
    """Return for each kind of tiles the best products together, with the seconds to expect; best first."""
    kinds: dict[Any, list[Trial]] = {}
    for trial in times:
        kinds.setdefault(trial.kind, []).append(trial)
    found = []
    for own in kinds.values():
        first, second = (min(own, key=lambda t, s=stage: times[t][s]) for stage in STAGES)  # type: ignore[misc]
        rest = statistics.median(times[t]["rest"] for t in own)
        total = times[first]["gate_up"] + times[second]["down"] + rest
        found.append((total, replace(first, down=second.down)))
    return sorted(found, key=lambda pair: pair[0])


def time_cell(
    coded: CodedLayer, kernel: Any, peer: Any, tokens: int, g: torch.Generator, say: Any
) -> dict[str, Any]:
    """Time all trials of one number of tokens, and the best ones in turn with what there is."""
    inputs = random_inputs(coded.spec, coded.layer, tokens, g)
    sample = torch.arange(min(tokens, SAMPLE), device=g.device)
    expected = expected_rows(coded, inputs[0], sample, None)
    # Quantised activations are compared with exact ones: the bar is what they may lose.
    bar = 6e-2 if coded.spec.activation_scheme else WEIGHTS_ALONE
    average = inputs[0].topk_ids.numel() / coded.spec.num_experts
    now = error(kernel.compute(inputs[0])[: len(expected)], expected)
    if not now <= bar:
        say(f"  WRONG: the present table: relative error {now:.1e}")
    is_alone = coded.spec.activation_scheme is None
    own = trials(coded.spec.weight_format, is_alone, tokens, average)  # type: ignore[arg-type]
    sound = find_sound(kernel, own, inputs[0], expected, bar, say)
    try:
        times = stage_times(kernel, sound, inputs)
    except Exception as why:  # noqa: BLE001 - the profiler may be missing
        say(f"  the products were not seen apart, layers are timed instead: {why!r}"[:300])
        times = layer_times(kernel, sound, inputs)
    best = put_together(times)[:3]
    ways = {"now": kernel} | {f"best {n}": with_table(kernel, trial) for n, (_, trial) in enumerate(best)}
    calls = {name: [partial(way.compute, x) for x in inputs] for name, way in ways.items()}
    if peer is not None:
        calls["bf16"] = [partial(peer, x) for x in inputs]
    layer = times_in_turn(calls, rounds=8)
    shown = ", ".join(f"{name} {seconds * 1e6:.1f}" for name, seconds in layer.items())
    say(f"M={tokens} ({average:.2f} rows an expert): {shown} us")
    for n, (total, trial) in enumerate(best):
        say(f"    best {n}: {trial}, products {total * 1e6:.1f} us")
    return {
        "tokens": tokens, "rows": average, "layer": layer,
        "best": [plain(trial) for _, trial in best],
        "trials": [{**plain(t), **seconds} for t, seconds in times.items()],
    }  # fmt: skip


def plain(trial: Trial) -> dict[str, Any]:
    return {k: v for k, v in asdict(trial).items()} | {"text": str(trial)}


def list_jobs(args: argparse.Namespace, machine: Machine) -> list[Job]:
    """Return everything that will be launched, each trial once; what takes longest to compile comes first."""
    jobs: dict[Any, Job] = {}
    for model in args.models:
        layer = LAYERS[model]
        for name in args.formats:
            for tokens in args.tokens:
                coding, average = FORMATS[name], tokens * layer.top_k / layer.experts
                for trial in trials(coding.weight, coding.scheme is None, tokens, average):
                    few = 1 if trial.is_vector else 16
                    jobs[model, name, trial] = Job(model, name, machine, trial, few)
        for name in args.formats if args.alone else (None, *args.formats):
            for tokens in args.tokens:
                jobs[model, name, tokens] = Job(model, name, machine, None, tokens)
    return list(jobs.values())


def measure(args: argparse.Namespace, say: Any) -> dict[str, Any]:
    """Search every requested format of every requested layer until the time is over."""
    machine = Machine.of("cuda")
    g = torch.Generator("cuda").manual_seed(args.seed)
    jobs = list_jobs(args, machine)
    compile_all(jobs, say)
    say(f"{len(jobs)} trials compiled")
    cells: list[dict[str, Any]] = []
    for model in args.models:
        peer = None
        for name in args.formats:
            coded = draw_layer(LAYERS[model], FORMATS[name], DTYPE, g)
            kernel = load_coded(coded)
            if peer is None and not args.alone:
                peer = contenders(coded, kernel, False, ["bf16"])["bf16"]
            say(f"{model} {name}: {kernel.nbytes() / 1e6:.0f} MB")
            for tokens in args.tokens:
                if time.perf_counter() - args.begin > args.seconds:
                    say(f"{model} {name} M={tokens}: left out, {args.seconds:.0f} s are over")
                    continue
                try:
                    cell = time_cell(coded, kernel, peer, tokens, g, say)
                except Exception as why:  # noqa: BLE001 - machine time is scarce: the other cells go on
                    say(f"FAILED {model} {name} M={tokens}: {why!r}"[:400])
                    continue
                cells.append({"model": model, "format": name, **cell})
                if args.json:
                    args.json.write_text(json.dumps({"machine": asdict(machine), "cells": cells}, indent=1))
            del coded, kernel
            torch.cuda.empty_cache()
    return {"cells": cells}


def print_table(cells: list[dict[str, Any]]) -> None:
    """Print a line for each cell: the present table, the best one, bfloat16, and the best trial."""
    for cell in cells:
        now, best = cell["layer"]["now"], cell["layer"]["best 0"]
        plain_us = cell["layer"].get("bf16", math.nan) * 1e6
        sys.stdout.write(
            f"{cell['model']:10} {cell['format']:16} {cell['tokens']:5} now {now * 1e6:7.1f} best "
            f"{best * 1e6:7.1f} bf16 {plain_us:7.1f}  {cell['best'][0]['text']}\n"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=["gpt-oss"], choices=LAYERS)
    parser.add_argument("--formats", nargs="+", default=["mxfp4"], choices=FORMATS)
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 3, 16, 64, 257, 1024, 4096])
    parser.add_argument("--seconds", type=float, default=100.0, help="no new cell is begun after that")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--alone", action="store_true", help="do not time bfloat16 beside it")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    args.begin = time.perf_counter()

    def say(text: str) -> None:
        sys.stdout.write(f"{time.perf_counter() - args.begin:6.1f} s  {text}\n")
        sys.stdout.flush()

    print_table(measure(args, say)["cells"])


if __name__ == "__main__":
    main()
