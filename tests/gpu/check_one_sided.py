"""Check and measure the one-sided exchange between GPUs of one node.

Not part of the test run, which needs none.

    mpirun -n 2 python -m mpi4py tests/gpu/check_one_sided.py checks stress bench --json one-sided.json
    mpirun -n 2 python -m mpi4py tests/gpu/check_one_sided.py layers --json layers.json
    mpirun -n 2 python -m mpi4py tests/gpu/check_one_sided.py alone     # exact mode's bits; a rank must see
    one GPU only mpirun -n 2 python -m mpi4py tests/gpu/check_one_sided.py late      # a rank stays away:
    deadline and abort word mpirun -n 2 python -m mpi4py tests/gpu/check_one_sided.py kill      # must end by
    itself; the GPUs are empty afterwards mpirun -n 2 python -m mpi4py tests/gpu/check_one_sided.py hang
    # must end by itself within 10 s, with a report

xpar need not be installed: the rooms are taken from this checkout.
"""

import argparse
import json
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(Path(__file__).parent), str(ROOT / "tests" / "support"), str(ROOT / ".typing")]

import one_sided_checks
import one_sided_layers
import torch

from xpar.comm import ProcessGrid, World, run
from xpar.comm.watchdog.deadlines import Deadlines
from xpar.engine.bench.graph_exchange import Sizes, measure_all

SHAPES = {
    "olmoe": (2048, 64, 8),
    "mixtral": (4096, 8, 2),
    "qwen3-30b": (2048, 128, 8),
    "deepseek-v3": (7168, 256, 8),
}
TOKENS = (1, 4, 16, 64, 128, 256, 1024, 4096)
PARTS = ("access", "checks", "stress", "bench", "layers", "alone", "late", "kill", "hang")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="+", choices=PARTS)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--seed", type=int, default=int(time.time()) % 10**6, help="of rank 0 counts")
    parser.add_argument("--steps", type=int, default=8000, help="of the stress")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--tokens", type=int, nargs="+", default=list(TOKENS), help="a rank, for bench")
    parser.add_argument(
        "--seconds", type=float, default=400.0, help="the job ends after that, whatever it does"
    )
    parser.add_argument("--scale", type=float, default=1.0, help="of the layers' widths")
    args = parser.parse_args()
    world = World.attach()
    limit = threading.Timer(args.seconds, lambda: world.comm.abort(3))
    limit.daemon = True
    limit.start()
    seed = world.comm.all_gather_object(args.seed)[0]
    begin = time.perf_counter()
    grid = ProcessGrid.create(world, device="cuda", transport="nccl")
    assert grid.peer_window is not None
    report: dict[str, Any] = {
        "ranks": world.size,
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "seed": seed,
        "access": grid.peer_window.access.explain().splitlines(),
        "seconds_to_grid": round(time.perf_counter() - begin, 2),
    }
    say(world, json.dumps(report, indent=1))
    wrong = False
    for part in args.parts:
        begin = time.perf_counter()
        if part == "bench":
            report[part] = [
                bench(world, grid, name, tokens, seed) for name in args.shapes for tokens in args.tokens
            ]
        elif part == "layers":
            report[part] = []
            cases = (("olmoe", args.scale), ("qwen2-57b-a14b", 0.125 * args.scale), ("deepseek-v3", 0.0625))
            for name, scale in cases:
                for row in one_sided_layers.layers(world, grid, name, scale, seed):
                    report[part].append(row)
                    wrong |= bool(row["wrong"])
                    say(world, json.dumps(row))
        elif part == "alone":
            found = world.comm.all_gather_object(one_sided_layers.alone(world, grid, "olmoe", 0.25, seed))
            report[part] = found
            wrong |= any(found)
            say(world, f"alone: {found}")
        elif part == "kill":
            kill(world, grid)
        elif part == "hang":
            hang(world)
        elif part == "checks":
            report[part] = []
            for title, check in one_sided_checks.checks(grid, {n: SHAPES[n] for n in args.shapes}, seed):
                problem = world.comm.all_gather_object(check())
                report[part].append({"check": title, "problems": [p for p in problem if p]})
                wrong |= any(problem)
                say(world, f"{'WRONG' if any(problem) else 'ok':6}{title} {[p for p in problem if p]}")
        else:
            found = getattr(one_sided_checks, part)(world, grid, args.steps, seed)
            report[part] = found
            wrong |= bool(found.get("wrong"))
            say(world, f"{part}: {json.dumps(found)}")
        say(world, f"{part} took {time.perf_counter() - begin:.1f} s")
        if args.json is not None and world.rank == 0:
            args.json.write_text(json.dumps(report, indent=1) + "\n")
    grid.close()
    return int(wrong)


def bench(world: World, grid: ProcessGrid, name: str, tokens: int, seed: int) -> dict[str, Any]:
    h, experts, k = SHAPES[name]
    record = {"shape": name, **measure_all(grid, [Sizes(tokens, h, experts, k, seed)])[0]}
    say(
        world,
        f"{name:12} T {tokens:5} dispatch {record['one-sided dispatch us']:7.1f} "
        f"({record['allgather dispatch us']:7.1f})"
        f" combine {record['one-sided combine us']:7.1f} ({record['allgather combine us']:7.1f})"
        f" both {record['one-sided round trip us']:7.1f} ({record['allgather round trip us']:7.1f})"
        f" rows alone at {record['link_gbs']:.0f} GB/s {record['link_us']:7.1f} us  same bits "
        f"{record['same_bits']}",
    )
    return record


def kill(world: World, grid: ProcessGrid) -> None:
    """The last rank is killed while the others wait for its rows on the GPU."""
    one_sided_checks.stress(world, grid, 20, 0)
    say(world, f"rank {world.size - 1} is killed at {time.time():.1f}")
    if world.rank == world.size - 1:
        os.kill(os.getpid(), signal.SIGKILL)
    one_sided_checks.lonely_dispatch(grid)
    torch.cuda.synchronize()
    sys.stderr.write("the job was not ended\n")


def hang(world: World) -> None:
    """The last rank stays away while the others replay a recorded exchange: the watching thread must end the
    job."""
    grid = ProcessGrid.create(world, device="cuda", transport="nccl", deadlines=Deadlines(finish=3))
    window, watch = grid.peer_window, grid.transport.watch if grid.transport is not None else None
    assert window is not None and watch is not None
    made = torch.zeros(16 * world.size, 2048, dtype=torch.bfloat16, device=grid.device)

    def step() -> None:
        one_sided_checks.lonely(window, grid, tables).rows_home(made)

    tables = one_sided_checks.lonely_tokens(grid)
    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with watch.paused(), torch.cuda.graph(graph):
        step()
    world.comm.barrier()
    say(world, f"rank {world.size - 1} stays away from {time.time():.1f}")
    if world.rank == world.size - 1:
        time.sleep(60)
    graph.replay()
    torch.cuda.synchronize()
    time.sleep(10)
    sys.stderr.write("the job was not ended\n")


def say(world: World, text: str) -> None:
    if world.rank == 0:
        sys.stdout.write(text + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(run(main))
