"""Check and measure communication between GPUs; not part of the test run, which needs none.

    mpirun -n 2 python -m mpi4py tests/gpu/check_comm.py --json comm.json
    mpirun -n 2 python -m mpi4py tests/gpu/check_comm.py --hang      # must end the job by itself within 20 s,
    with a report
    mpirun -n 2 python -m mpi4py tests/gpu/check_comm.py --hang-launch    # the same, in the launch of a first
    all_gather

xpar need not be installed: the rooms are taken from this checkout. Every rank of the job takes part; several
ranks on one GPU pose as hosts of their own to NCCL. ``--device cpu`` plays everything
through host memory, to see that the script itself works.
"""

import argparse
import faulthandler
import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(Path(__file__).parent), str(ROOT / "tests" / "support"), str(ROOT / ".typing")]

import comm_bench
import comm_checks
import torch

from xpar.comm import ProcessGrid, World, run
from xpar.comm.device.binding import bind_gpu, driver_version
from xpar.comm.device.transport import open_transport
from xpar.comm.device.transport_choice import DeviceFacts, choose_transport, collect_facts, host_override
from xpar.comm.watchdog.deadlines import Deadlines


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--seed", type=int, default=int(time.time()) % 10**6, help="of rank 0 counts")
    parser.add_argument(
        "--link-gbs", type=float, default=450.0, help="GB/s a direction of a GPU (NVLink 4: 450)"
    )
    parser.add_argument(
        "--seconds", type=float, default=400.0, help="the job ends after that, whatever it does"
    )
    parser.add_argument("--only", choices=["checks", "bench"], help="one half")
    parser.add_argument("--hang", action="store_true", help="a rank stays away: see the watch end the job")
    parser.add_argument("--hang-launch", action="store_true", help="the same, with a launch that waits")
    args = parser.parse_args()
    world = World.attach()
    limit = threading.Timer(args.seconds, late, (world,))
    limit.daemon = True
    limit.start()
    seed = world.comm.all_gather_object(args.seed)[0]
    report: dict[str, Any] = {"ranks": world.size, "seed": seed, **environment(world, args.device)}
    say(world, json.dumps(report, indent=1))
    if args.hang or args.hang_launch:
        return hang(world, args.device, args.hang_launch)
    results: list[dict[str, Any]] = []
    figures: list[dict[str, Any]] = []
    grids: dict[str, ProcessGrid] = {}
    for name in report["transports"]:
        grid = grid_of(world, args.device, name)
        if args.only != "bench":
            for title, check in comm_checks.checks(world, grid, name, seed):
                results.append(outcome(world, f"{name}: {title}", check))
        if args.only != "checks":
            figures += [f | {"transport": name} for f in comm_bench.figures(world, grid, args.link_gbs)]
        write(world, args.json, report | {"checks": results, "figures": figures})
        grids[name] = grid
    for name, grid in grids.items():
        for title, check in comm_checks.last_checks(world, grid, name, seed) if args.only != "bench" else ():
            results.append(outcome(world, f"{name}: {title}", check))
    write(world, args.json, report | {"checks": results, "figures": figures})
    if world.rank == 0:
        table(results, figures)
    return int(not all(r["ok"] for r in results))


def environment(world: World, device: str) -> dict[str, Any]:
    """What this run stands on, and the transports that can be tried."""
    facts: dict[str, Any] = {"torch": torch.__version__, "mpi": world.library.splitlines()[0]}
    if device == "cpu":
        return facts | {"transports": ["staged", "mpi"]}
    mine: DeviceFacts = collect_facts(bind_gpu(world.local_rank))
    everyone = world.comm.all_gather_object(mine)
    maps = Path("/proc/self/maps").read_text().split()
    facts |= {
        "driver": driver_version(),
        "gpus": [f"{f.gpu} {f.gpu.uuid}" for f in everyone],
        "nccl": mine.nccl,
        "libnccl": sorted({word for word in maps if "libnccl" in word}),
        "choice": choose_transport(everyone).explain().splitlines(),
        "peer_access": world.size > 1
        and torch.cuda.device_count() > 1
        and torch.cuda.can_device_access_peer(0, 1),
        "NCCL_variables": {k: v for k, v in os.environ.items() if k.startswith("NCCL_")},
    }
    nccl = world.size > 1 and mine.nccl is not None
    return facts | {"transports": ["nccl", "staged"] if nccl else ["staged"]}


def grid_of(world: World, device: str, transport: str) -> ProcessGrid:
    """All ranks one expert group."""
    if device == "cuda":
        return ProcessGrid.create(world, device="cuda", transport=transport)
    return comm_checks.host_grid(world, transport)


def outcome(world: World, title: str, check: Callable[[], str | None]) -> dict[str, Any]:
    """Run one check on every rank; it returns a remark or None, and raises what is wrong."""
    remark, problem = None, None
    begin = time.perf_counter()
    try:
        remark = check()
    except Exception as error:  # noqa: BLE001 - shown, and the other checks go on
        problem = f"{type(error).__name__}: {error}"
        traceback.print_exc()
    problems = world.comm.all_gather_object(problem)
    wrong = [f"rank {r}: {p}" for r, p in enumerate(problems) if p]
    seconds = round(time.perf_counter() - begin, 2)
    say(world, f"{'ok' if not wrong else 'WRONG':6}{title} {remark or ''} {'; '.join(wrong)[:300]}")
    return {"check": title, "ok": not wrong, "remark": remark, "problems": wrong, "seconds": seconds}


def hang(world: World, device: str, first: bool = False) -> int:
    """Rank 0 starts an exchange that nobody joins, and then waits for its GPU as any program would.

    ``first``: it is the first one of its kind, in whose launch NCCL itself waits for the other ranks.
    """
    deadlines = Deadlines(connect=60, launch=5 if first else 60, finish=5, abort=2)
    facts = world.comm.all_gather_object(collect_facts(bind_gpu(world.local_rank)))
    choice = choose_transport(facts, "nccl")
    where = torch.device("cuda", torch.cuda.current_device())
    host = host_override(facts, world.rank)
    opened = open_transport(world.comm, where, choice, deadlines, required=True, host=host)
    group = opened.wrap(world.comm)
    if world.rank == 0:
        counts = [1] * world.size
        if first:
            group.all_gather_v(torch.ones(1, 1024, device=where), counts)
        else:
            group.all_to_all_v(torch.ones(world.size, 1024, device=where), counts, counts)
        torch.cuda.synchronize()
    else:
        time.sleep(60)
    sys.stderr.write("the job was not ended\n")
    return 1


def write(world: World, path: Path | None, report: dict[str, Any]) -> None:
    """After each part, so that what is known survives a crash of the next."""
    if path is not None and world.rank == 0:
        path.write_text(json.dumps(report, indent=1) + "\n")


def late(world: World) -> None:
    sys.stderr.write(f"rank {world.rank}: not finished in time\n")
    faulthandler.dump_traceback()
    world.comm.abort(3)


def say(world: World, text: str) -> None:
    if world.rank == 0:
        sys.stdout.write(text + "\n")
        sys.stdout.flush()


def table(results: list[dict[str, Any]], figures: list[dict[str, Any]]) -> None:
    def lines() -> Iterator[str]:
        yield f"{'transport':10}{'what':26}{'size':>22}{'us':>10}{'us host':>9}{'GB/s':>8}{'of link':>9}"
        for f in figures:
            share = f"{100 * f['gbs'] / f['bound_gbs']:.0f} %" if f["gbs"] else ""
            gbs = f"{f['gbs']:.1f}" if f["gbs"] else ""
            times = f"{f['us']:>10.1f}{f['us_host']:>9.1f}"
            yield f"{f['transport']:10}{f['what']:26}{f['size']:>22}{times}{gbs:>8}{share:>9}"
        bad = [r for r in results if not r["ok"]]
        yield f"{len(results) - len(bad)} checks ok, {len(bad)} wrong"
        for r in bad:
            yield f"  {r['check']}: {'; '.join(r['problems'])[:160]}"

    sys.stdout.write("\n".join(lines()) + "\n")


if __name__ == "__main__":
    sys.exit(run(main))
