"""Check the launches of the expert kernels on one GPU, and time them in turn beside others.

Needs one GPU, not part of the test run.

    python tests/gpu/compare_choices.py [--layers NAME ...] [--tokens M ...] [--seconds 140] [--json FILE]

First the sorts and every form of the table are compared with torch and float64. Then each layer and number of
tokens is timed with the table's choices (new), with those of before (former), and with other forms that
could be data of the table, all in one run. Compiling, in threads, takes most of the time.
"""

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / ".typing"), str(Path(__file__).parent)]

import torch
from tile_forms import FORMS, VECTORS

from xpar.engine.bench.ceilings import GpuCeilings, measure_gpu_ceilings
from xpar.engine.bench.gpu_turns import Turns
from xpar.engine.bench.kernels import checks
from xpar.engine.bench.kernels.cases import LAYERS, Weights, load_experts, random_inputs, random_weights
from xpar.engine.bench.kernels.tile_search import with_table
from xpar.engine.bench.timing import graphs_in_turn, record_graph
from xpar.kernels.contracts import ExpertInput
from xpar.kernels.gpu.default_tables import former_table
from xpar.kernels.gpu.expert_sort import plan_tiles
from xpar.kernels.gpu.experts import TritonExperts
from xpar.kernels.gpu.tile_tables import NO_LIMIT, Height, Limits, Table

NAMES = ("qwen3-30b", "mixtral", "olmoe", "gpt-oss", "qwen3-235b", "deepseek-v3-slice")
TOKENS = (257, 1024, 64, 4, 4096, 16, 1)
COMPILING = 0.55  # fraction of the time that compiling may take
THREADS = 16


@dataclass(frozen=True)
class Layer:
    """A layer with its weights, and inputs for each number of tokens."""

    name: str
    kernel: TritonExperts
    weights: Weights
    inputs: dict[int, list[ExpertInput]]

    def variants(self, tokens: int) -> dict[str, Table]:
        """Return the tables to time at a number of tokens, by name: new and former first."""
        table, x = self.kernel.table, self.inputs[tokens][0]
        found = {"new": table, "former": former_table(table)}
        found["dependent"] = replace(table, dependent=True)
        slots = x.topk_ids.numel()
        if tokens <= table.vector_tokens:
            found |= {
                "vector": replace(table, vector_bytes=1 << 62),
                "tiles": replace(table, vector_tokens=0),
            }
            always = replace(table, vector_bytes=1 << 62)
            for name, vector in VECTORS.items() if tokens == 1 else ():
                found[f"gate_up {name}"] = replace(always, gate_up_vector=vector)
                found[f"down {name}"] = replace(always, down_vector=vector)
            return found
        found["other sort"] = replace(table, ranked_slots=0 if slots <= table.ranked_slots else slots)
        found["lists"] = replace(table, heights=())
        spec = self.kernel.spec
        average = slots / (spec.routed_experts or spec.num_experts)
        present = table.layout(tokens, slots, spec.num_experts, float(slots)).lists[0][1]
        if average >= 4 and present.swapped:
            found["dependent, prefetch"] = replace(table, dependent=True, prefetch=512)
        for name, (least, most, tiles) in FORMS.items():
            if least <= average <= most and tiles != present:
                found[name] = replace(table, heights=(Height(NO_LIMIT, tiles),))
        return found


class Run:
    """One run: its deadline, its results, and what failed."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.begin, self.args = time.perf_counter(), args
        self.failures: list[str] = []
        self.results: dict[str, Any] = {"checks": {}, "sorts": [], "cells": [], "failures": self.failures}

    def seconds(self) -> float:
        return time.perf_counter() - self.begin

    def is_late(self, share: float = 1.0) -> bool:
        return self.seconds() > share * float(self.args.seconds)

    def say(self, text: str) -> None:
        sys.stdout.write(f"{self.seconds():6.1f} s  {text}\n")
        sys.stdout.flush()

    def attempt(self, name: str, action: Callable[[], Any]) -> Any:
        """Return what ``action`` returns; None after an error, which is noted."""
        try:
            return action()
        except Exception as why:  # noqa: BLE001 - machine time is scarce: the rest goes on
            self.failures.append(f"{name}: {why!r}"[:400])
            self.say(f"FAILED {name}: {why!r}"[:300])
            return None

    def save(self) -> None:
        if self.args.json:
            self.args.json.write_text(json.dumps(self.results, indent=1))


def main() -> int:
    p = argparse.ArgumentParser()
    p.add_argument("--layers", nargs="+", choices=LAYERS, default=list(NAMES))
    p.add_argument("--tokens", nargs="+", type=int, default=list(TOKENS))
    p.add_argument("--seconds", type=float, default=140.0)
    p.add_argument("--json", type=Path)
    run = Run(p.parse_args())
    g = torch.Generator("cuda").manual_seed(torch.seed() % 2**31)
    layers = [load_layer(name, run.args.tokens, g) for name in run.args.layers]
    run.say(f"{len(layers)} layers loaded, {torch.cuda.get_device_name()}, torch {torch.__version__}")
    bad = compile_all(run, layers)
    check(run, "dependent", partial(checks.check_dependent, g))
    ceilings = run.attempt("ceilings", measure_gpu_ceilings)
    if ceilings:
        run.results["ceilings"] = vars(ceilings)
        run.say(f"{ceilings.bandwidth / 1e12:.2f} TB/s, {ceilings.flops / 1e12:.0f} TFLOP/s")
    run.attempt("times of sorts", partial(time_sorts, run, g))
    for tokens in run.args.tokens:
        for layer in layers:
            if run.is_late():
                run.say(f"{layer.name} M={tokens}: left out")
                continue
            run.attempt(f"{layer.name} M={tokens}", partial(time_cell, run, layer, tokens, bad, g, ceilings))
            run.save()
    report(run)
    run.save()
    return int(bool(run.failures))


def check(run: Run, name: str, action: Callable[[], str]) -> None:
    """Run a check and keep its result."""
    run.results["checks"][name] = run.attempt(name, action)
    run.say(f"{name}: {run.results['checks'][name]}")


def load_layer(name: str, tokens: list[int], g: torch.Generator) -> Layer:
    case = LAYERS[name]
    kernel = TritonExperts(case.spec(torch.bfloat16))
    weights = random_weights(kernel.spec, g)
    load_experts(kernel, weights)
    return Layer(name, kernel, weights, {m: random_inputs(kernel.spec, case, m, g) for m in tokens})


def compile_all(run: Run, layers: list[Layer]) -> set[tuple[str, str]]:
    """Compile every variant in threads, beside two checks; return (layer, form) that cannot run.

    Variants that share a form share its code, so that each form is compiled by one thread.
    """
    units: dict[tuple[str, str], list[tuple[Layer, int, Table]]] = {}
    for rank in range(3):  # new and former first, then what may change all cells
        for tokens in run.args.tokens:
            for layer in layers:
                for name, table in layer.variants(tokens).items():
                    if {"new": 0, "former": 0, "dependent": 1, "dependent, prefetch": 1}.get(name, 2) == rank:
                        key = (layer.name, form_of(layer, table, tokens))
                        units.setdefault(key, []).append((layer, tokens, table))
    faults: dict[tuple[str, str], str] = {}

    def compile_unit(key: tuple[str, str]) -> None:
        for place, (layer, tokens, table) in enumerate(units[key]):
            if run.is_late(COMPILING):
                if place == 0:
                    faults[key] = "late"
                return
            try:
                with_table(layer.kernel, table).compute(layer.inputs[tokens][0])
            except Exception as why:  # noqa: BLE001 - one form must not end the run
                faults[key] = repr(why)[:200]
                return

    with ThreadPoolExecutor(THREADS) as pool:
        for name, action in (("sorts", checks.check_sorts), ("forms", checks.check_forms)):
            pool.submit(check, run, name, partial(action, torch.Generator("cuda").manual_seed(torch.seed())))
        list(pool.map(compile_unit, units))
    torch.cuda.synchronize()
    for key, why in faults.items():
        if why != "late":
            run.failures.append(f"{key}: {why}")
            run.say(f"left out: {key}: {why}")
    late = [key for key, why in faults.items() if why == "late"]
    run.say(f"{len(units)} forms compiled, {len(late)} came too late: {late}")
    return set(faults)


def form_of(layer: Layer, table: Table, tokens: int) -> str:
    """Name the code that a table needs for a number of tokens: its form, lists or vectors."""
    kernel, x = with_table(layer.kernel, table), layer.inputs[tokens][0]
    early = f"dependent {table.prefetch} " if table.dependent else ""
    if kernel.is_tiny(x):
        return f"{early}vector {table.gate_up_vector} {table.down_vector}"
    found = kernel.layout(tokens, x.topk_ids.numel())
    return early + ("lists" if found.height is None else str(found.lists[0][1]))


def time_cell(
    run: Run,
    layer: Layer,
    tokens: int,
    bad: set[tuple[str, str]],
    g: torch.Generator,
    ceilings: GpuCeilings | None,
) -> None:
    """Check each variant against float64 on a few tokens, then time all that are right, in turn."""
    inputs = layer.inputs[tokens]
    sample = torch.randperm(tokens, generator=g, device="cuda")[:6]
    expected = checks.expected_rows(layer.kernel.spec, layer.weights, inputs[0], sample)
    graphs, cell = {}, f"{layer.name} M={tokens}"
    for name, table in layer.variants(tokens).items():
        if (layer.name, form_of(layer, table, tokens)) in bad:
            continue
        kernel = with_table(layer.kernel, table)
        checks.poison(torch.device("cuda"))
        near = run.attempt(
            f"{cell} {name}",
            lambda k=kernel: checks.require_near(  # type: ignore[misc]
                k.compute(inputs[0])[sample], expected, torch.bfloat16, "sampled tokens"
            ),
        )
        if near:
            graphs[name] = record_graph([partial(kernel.compute, x) for x in inputs])
    turns = graphs_in_turn(graphs, rounds=6, burst=4e-3, has_card=tokens > 64)
    row = {"model": layer.name, "tokens": tokens, **cell_row(turns, len(inputs))}
    row["form"] = form_of(layer, layer.kernel.table, tokens)
    if ceilings:
        row["floor"] = sum(ceilings.floor_s(layer.kernel.spec, x) for x in inputs) / len(inputs)
    run.results["cells"].append(row)
    run.say(f"{cell}: {format_row(row)}")


def cell_row(turns: Turns, calls: int) -> dict[str, Any]:
    """Return seconds a call of each variant, and how many times as long as new each takes."""
    names = list(turns.seconds)
    return {
        "seconds": {name: turns.median(name) / calls for name in names},
        "ratios": {name: turns.ratio(name, "new") for name in names if name != "new" and "new" in names},
        "card": vars(turns.card) if turns.card else None,
    }


def format_row(row: dict[str, Any]) -> str:
    new = row["seconds"].get("new")
    shown = f"new {new * 1e6:.1f} us" if new else "new -"
    if new and "floor" in row:
        shown += f" ({row['floor'] / new:.0%})"
    return ", ".join([shown, *(f"{name} {ratio:.3f}" for name, ratio in row["ratios"].items())])


def time_sorts(run: Run, g: torch.Generator) -> None:
    """Time the sort alone, by ranks and in blocks, in microseconds."""
    tiles, all_in_one = (FORMS["16"][2].gate_up,) * 3, Limits(NO_LIMIT, NO_LIMIT)
    for slots, experts in ((32, 128), (512, 64), (512, 128), (2056, 128), (4096, 128), (8192, 128)):
        ids = torch.randint(experts, (slots // 8, 8), generator=g, device="cuda", dtype=torch.int32)
        calls = {
            ranked: partial(plan_tiles, ids, experts, tiles, all_in_one, ranked_slots=ranked)
            for ranked in (0, slots)
        }
        graphs = {f"ranked up to {ranked}": record_graph([call] * 20) for ranked, call in calls.items()}
        turns = graphs_in_turn(graphs, rounds=5, burst=1e-3, has_card=False)
        row = {"slots": slots, "experts": experts}
        row |= dict(zip(("blocks", "ranks"), (turns.median(name) / 20 for name in graphs), strict=True))
        run.results["sorts"].append(row)
        run.say(
            f"sort of {slots} slots, {experts} experts: {row['blocks'] * 1e6:.1f} us before, "
            f"{row['ranks'] * 1e6:.1f} us by ranks"
        )


def report(run: Run) -> None:
    """Print former / new of every cell as a table, and for each the fastest other form."""
    cells = {(row["model"], row["tokens"]): row for row in run.results["cells"]}
    for model in run.args.layers:
        sys.stdout.write(f"{model}\n")
        for tokens in sorted(run.args.tokens):
            row = cells.get((model, tokens))
            if row is None or "former" not in row["ratios"]:
                continue
            others = {name: r for name, r in row["ratios"].items() if name != "former"}
            best = min(others, key=lambda name: others[name], default=None)
            more = f", best other form: {best} {others[best]:.3f} of new" if best else ""
            share = f" {row['floor'] / row['seconds']['new']:.0%}" if "floor" in row else ""
            former, new = (row["seconds"][name] * 1e6 for name in ("former", "new"))
            gain = f"former / new {row['ratios']['former']:.3f}"
            sys.stdout.write(
                f"  M={tokens:5}: former {former:8.1f} us, new {new:8.1f} us{share}, {gain}{more}\n"
            )
    for name, ratios in grouped(cells):
        mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
        sys.stdout.write(f"{name}: geometric mean of former / new {mean:.3f}, least {min(ratios):.3f}\n")
    sys.stdout.write(f"{len(run.failures)} failures\n" + "".join(f"  {why}\n" for why in run.failures))


def grouped(cells: dict[tuple[str, int], dict[str, Any]]) -> Iterator[tuple[str, list[float]]]:
    """Yield the ratios of each number of tokens, then all."""
    found = {key: row["ratios"]["former"] for key, row in cells.items() if "former" in row["ratios"]}
    for tokens in sorted({key[1] for key in found}):
        yield f"M={tokens}", [ratio for key, ratio in found.items() if key[1] == tokens]
    if found:
        yield "all", list(found.values())


if __name__ == "__main__":
    sys.exit(main())
