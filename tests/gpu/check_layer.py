"""Check whole layers on GPUs and what recording them brings; not part of the test run, which needs none.

    python -m mpi4py tests/gpu/check_layer.py --json layer.json
    mpirun -n 2 python -m mpi4py tests/gpu/check_layer.py --transport nccl --json layer.json

xpar need not be installed: the rooms are taken from this checkout.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / ".typing")]

import torch
from torch import Tensor

from xpar.comm import ProcessGrid, World, run
from xpar.comm.partition import split_range
from xpar.engine.layer.build import build_layer, with_options
from xpar.engine.layer.cuda_graph import CapturedLayer
from xpar.engine.layer.options import LayerOptions
from xpar.engine.layer.runner import MoERunner
from xpar.engine.layer.shared_expert_overlap import SharedOrder
from xpar.engine.synthetic.layer import SyntheticLayer
from xpar.engine.synthetic.shapes import SHAPES

CASES = (("olmoe", 0.25), ("qwen2-57b-a14b", 0.125), ("deepseek-v3", 0.0625))
"""Most of the time goes into compiling kernels for each shape."""
TOKENS = (1, 16, 257)
REFERENCE_TOKENS = 16
TOLERANCE = 1e-2


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path)
    parser.add_argument("--seed", type=int, default=int(time.time()) % 10**6)
    parser.add_argument(
        "--transport", default="auto", help="nccl also lets ranks that share a GPU be recorded"
    )
    args = parser.parse_args()
    world = World.attach(allow_singleton=True)
    seed = world.comm.all_gather_object(args.seed)[0]
    grid = ProcessGrid.create(world, device="cuda", transport=args.transport)
    rows = []
    for name, scale in CASES:
        for row in check_shape(grid, name, scale, seed):
            rows.append(row)
            if world.rank == 0:
                sys.stdout.write(line(row) + "\n")
                sys.stdout.flush()
    wrong = [r for r in rows if is_wrong(r)]
    if world.rank == 0:
        document = {
            "ranks": world.size,
            "gpu": torch.cuda.get_device_name(),
            "torch": torch.__version__,
            "seed": seed,
            "rows": rows,
        }
        if args.json:
            args.json.write_text(json.dumps(document, indent=1) + "\n")
        sys.stdout.write(f"{len(rows)} rows, {len(wrong)} wrong\n")
    return int(bool(wrong))


def is_wrong(r: dict[str, Any]) -> bool:
    far = not max(r["eager_error"], r["graph_error"], r["fused_error"]) <= TOLERANCE
    return bool(far or r["orders_differ"] or r["compiled_differs"])


def check_shape(grid: ProcessGrid, name: str, scale: float, seed: int) -> Iterator[dict[str, Any]]:
    """Every number of tokens a rank: eager and recorded against the fp32 reference, no hidden wait, and both
    times."""
    layer = SyntheticLayer(SHAPES[name].layer(scale), torch.bfloat16, seed)
    runner = build_layer(layer.config, grid, torch.bfloat16, layer.read)
    fused = None
    if layer.config.shared is not None:
        options = LayerOptions(fuse_shared_experts=True)
        fused = build_layer(layer.config, grid, torch.bfloat16, layer.read, options)
    for tokens in TOKENS:
        size = grid.world.size
        everyone = torch.randn(tokens * size, layer.config.hidden_size, generator=generator(seed)).bfloat16()
        mine = everyone[split_range(tokens * size, size, grid.world.rank)].to(grid.device)
        eager = runner(mine).clone()
        waits = hidden_waits(runner, mine)
        graph = CapturedLayer(runner, tokens + 2)  # two rows of padding
        recorded = graph(mine).clone()
        reference = layer.reference(everyone)[0] if tokens <= REFERENCE_TOKENS else None
        wanted = eager if reference is None else reference
        yield {
            "shape": name,
            "scale": scale,
            "tokens_per_rank": tokens,
            "dispatcher": runner.dispatcher.name,
            "eager_error": error(grid, eager, reference),
            "graph_error": error(grid, recorded, wanted),
            "fused_error": 0.0 if fused is None else error(grid, fused(mine), wanted),
            "hidden_wait": waits,
            "compiled_differs": compiled_differs(runner, mine),
            "orders_differ": orders_that_differ(runner, mine),
            "eager_us": microseconds(grid, runner, mine),
            "graph_us": microseconds(grid, graph, mine),
        }


def error(grid: ProcessGrid, y: Tensor, want: Tensor | None) -> float:
    """Relative to ``want``, of all ranks' tokens or of this rank's, whichever it holds."""
    if want is None:
        return 0.0
    if want.device.type == "cpu":
        y = grid.world.comm.all_gather_v(y).cpu()
    return float((y.float() - want.float()).norm() / want.float().norm())


def hidden_waits(runner: MoERunner, x: Tensor) -> str | None:
    """What torch says where the host would wait for the GPU, or None."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        runner(x)
    except RuntimeError as found:
        return str(found).splitlines()[0][:150]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return None


def compiled_differs(runner: MoERunner, x: Tensor) -> bool:
    """Whether a graph with the layer in it computes other bits than the layer.

    One that does not compile raises.
    """
    expected = runner(x) * 2
    torch.compiler.reset()
    with torch.no_grad():
        compiled = torch.compile(lambda y: runner(y) * 2, fullgraph=True, backend="aot_eager")
        return not torch.equal(compiled(x), expected)


def orders_that_differ(runner: MoERunner, x: Tensor) -> list[str]:
    """Orders of the shared experts whose output, eager or recorded, has other bits than that of none at
    all."""
    if runner.shared is None:
        return []
    found = []
    expected = with_options(runner, shared_order=SharedOrder.NONE)(x).clone()
    for order in SharedOrder:
        ordered = with_options(runner, shared_order=order)
        graph = CapturedLayer(ordered, x.shape[0])
        outputs = {f"{order.value} eager": ordered(x), f"{order.value} graph": graph(x)}
        found += [name for name, y in outputs.items() if not torch.equal(y, expected)]
    return found


def microseconds(grid: ProcessGrid, layer: Callable[[Tensor], Tensor], x: Tensor, repeats: int = 30) -> float:
    """Of one call among many that follow each other, as decoding does; the slowest rank's."""
    layer(x)
    torch.cuda.synchronize()
    grid.world.comm.barrier()
    begin = time.perf_counter()
    for _ in range(repeats):
        layer(x)
    torch.cuda.synchronize()
    mine = (time.perf_counter() - begin) / repeats * 1e6
    return max(grid.world.comm.all_gather_object(mine))


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def line(r: dict[str, Any]) -> str:
    return (
        f"{r['shape']:16}x{r['scale']:<5} {r['tokens_per_rank']:4} tokens {r['dispatcher']:10} eager "
        f"{r['eager_us']:7.0f} us"
        f"  graph {r['graph_us']:7.0f} us  {r['eager_us'] / r['graph_us']:5.1f} x  errors "
        f"{r['eager_error']:.1e}"
        f" {r['graph_error']:.1e} {r['fused_error']:.1e}  {r['hidden_wait'] or 'no hidden wait'}  "
        f"{' '.join(r['orders_differ'])}"
        f"{'  compiled differs' if r['compiled_differs'] else ''}"
    )


if __name__ == "__main__":
    sys.exit(run(main))
