"""List the kernels of one recorded decoding step by name, with fused small operations and without.

Needs a GPU, not part of the test run.

    python tests/gpu/count_launches.py CHECKPOINT --batch 1 16 --json launches.json
    python tests/gpu/count_launches.py CHECKPOINT --device cpu

Both sides get the same tokens, the same weights and the same random keys and values. Their logits are
compared with float32's, to which each should be as near: among random keys routers are often undecided.
Counts and microseconds are those of a layer; what is outside of layers is spread over them. On a host
processor torch's operators are counted instead. xpar need not be installed: the rooms are taken from this
checkout.
"""

import argparse
import json
import statistics
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / ".typing")]

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from xpar.comm import ProcessGrid, World
from xpar.engine.generation.decode_graph import record
from xpar.engine.generation.flat_recorder import FlatDecodeStep
from xpar.engine.models.expert_layer import ATTRIBUTE
from xpar.engine.models.flat_forward import FlatForward, flat_forms
from xpar.engine.models.fused_ops import fuse_operations
from xpar.engine.models.kv_pool import BLOCK_TOKENS
from xpar.engine.models.loaded_model import LoadedModel
from xpar.engine.models.loader import load_model
from xpar.engine.models.parallelize import SpreadOptions
from xpar.engine.models.span_pool import SpanPool
from xpar.kernels.gpu.span_attention import SpanAttention

STEPS, SEEN = 50, 4
"""Replays that are timed one by one, and those whose kernels are listed."""
VIEWS = {
    "view", "_unsafe_view", "reshape", "transpose", "t", "permute", "expand", "slice", "select", "unsqueeze",
    "squeeze", "detach", "alias", "split", "split_with_sizes", "unbind", "as_strided", "empty", "empty_like",
    "new_empty", "empty_strided", "lift_fresh",
}  # fmt: skip
"""Operators that launch nothing."""


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--batch", type=int, nargs="+", default=[1])
    parser.add_argument("--context", type=int, default=256, help="tokens of each sequence")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--rows", type=int, default=40, help="kernels of each list")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    grid = ProcessGrid.create(World.attach(allow_singleton=True), device=args.device)
    sides: dict[str, dict[int, dict[str, Any]]] = {}
    exact = load_model(args.checkpoint, grid, torch.float32, SpreadOptions(dense="plain", fuse=False))
    expected = {batch: logits_of(exact, batch, args.context) for batch in args.batch}
    del exact
    torch.cuda.empty_cache()
    for name, fuse in (("apart", False), ("fused", True)):
        loaded = load_side(args.checkpoint, grid, fuse)
        sides[name] = {batch: measure(loaded, batch, args.context) for batch in args.batch}
        del loaded
        torch.cuda.empty_cache()
    for batch in args.batch:
        report(batch, {name: rows[batch] for name, rows in sides.items()}, expected[batch], args.rows)
    if args.json:
        args.json.write_text(json.dumps(document(grid, sides, expected), indent=2) + "\n")
    return 0


def load_side(path: Path, grid: ProcessGrid, fuse: bool) -> LoadedModel:
    """Load the model in bfloat16; on a host processor, where nobody fuses, it is done here."""
    loaded = load_model(path, grid, torch.bfloat16, SpreadOptions(dense="plain", fuse=fuse))
    if fuse and grid.device.type == "cpu":
        names = [name for name, module in loaded.model.named_modules() if hasattr(module, ATTRIBUTE)]
        say(str(fuse_operations(loaded.model, names, torch.bfloat16)))
    return loaded


def make_step(loaded: LoadedModel, batch: int, context: int) -> FlatDecodeStep:
    """Make a step of ``batch`` sequences after ``context`` random keys and values each."""
    forms = flat_forms(loaded)
    if isinstance(forms, str):
        raise SystemExit(f"no flat batches: {forms}")
    blocks = -(-(context + 1) // BLOCK_TOKENS)
    by_flash = loaded.device.type == "cuda" and loaded.dtype != torch.float32
    attention = SpanAttention("flash" if by_flash else "definition")
    pool = SpanPool(forms, batch * blocks, loaded.device, attention)
    draw = torch.Generator().manual_seed(batch)
    for tensor in (*pool.keys, *pool.values):
        tensor.copy_(torch.randn(tensor.shape, generator=draw).bfloat16())
    step = FlatDecodeStep(FlatForward(loaded, pool), pool, loaded.layers, batch)
    vocab = loaded.model.config.get_text_config().vocab_size
    ids = torch.randint(vocab, (batch,), generator=draw).tolist()
    step.load(ids, [context] * batch, [row * blocks * BLOCK_TOKENS for row in range(batch)])
    return step


@torch.inference_mode()
def logits_of(loaded: LoadedModel, batch: int, context: int) -> Tensor:
    """Return the logits [batch, V] of a step, on the host."""
    return make_step(loaded, batch, context).forward().float().cpu()


def measure(loaded: LoadedModel, batch: int, context: int) -> dict[str, Any]:
    """Make a step of ``batch`` sequences; return its kernels, its times and its logits."""
    step, layers, device = make_step(loaded, batch, context), len(loaded.layers), loaded.device
    if device.type != "cuda":
        counts, logits = count_operators(step.forward)
        return {"logits": logits.float(), "layers": layers, "kernels": per_layer(counts, {}, layers)}
    with torch.inference_mode():
        launched = step.forward().float().cpu()
        counted = [layer.slot_counter.counted for layer in loaded.layers]
        replay = record(step, counted, device)
        logits = replay().float().cpu()
        counts, micros = list_kernels(replay)
        times = time_steps(replay)
    return {
        "logits": logits,
        "replay_rel_error": float((logits - launched).norm() / launched.norm()),
        "step_ms": round(statistics.median(times), 4),
        "layers": layers,
        "kernels": per_layer(counts, micros, layers),
    }


def list_kernels(replay: Callable[[], Tensor]) -> tuple[dict[str, float], dict[str, float]]:
    """Return how often each kernel runs in a replay, and its microseconds."""
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as seen:
        for _ in range(SEEN):
            replay()
        torch.cuda.synchronize()
    counts: Counter[str] = Counter()
    micros: dict[str, float] = defaultdict(float)
    for event in seen.events() or ():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            counts[event.name] += 1
            micros[event.name] += event.time_range.elapsed_us()
    return (
        {name: count / SEEN for name, count in counts.items()},
        {name: us / SEEN for name, us in micros.items()},
    )


def time_steps(replay: Callable[[], Tensor]) -> list[float]:
    """Return the milliseconds of replays, each timed by itself."""
    times = []
    for _ in range(STEPS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        replay()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end))
    return times


class OperatorCounter(TorchDispatchMode):
    """Counts torch's operators that compute something."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name not in VIEWS:
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))


@torch.inference_mode()
def count_operators(forward: Callable[[], Tensor]) -> tuple[dict[str, float], Tensor]:
    """Return how often each operator is called in a forward, and the logits."""
    forward()  # what is made once is made now
    with OperatorCounter() as counter:
        logits = forward()
    return {name: float(count) for name, count in counter.counts.items()}, logits


def per_layer(counts: dict[str, float], micros: dict[str, float], layers: int) -> list[dict[str, Any]]:
    """List kernels, those that take longest first, or those that are most."""
    order = sorted(counts, key=lambda name: (micros.get(name, 0.0), counts[name]), reverse=True)
    return [
        {
            "name": name,
            "count": round(counts[name] / layers, 2),
            "us": round(micros.get(name, 0.0) / layers, 2),
        }
        for name in order
    ]


def report(batch: int, sides: dict[str, dict[str, Any]], expected: Tensor, rows: int) -> None:
    """Print both lists and their sums, and how far each side's logits are from the ``expected``."""
    for name, side in sides.items():
        kernels = side["kernels"]
        say(f"\nbatch {batch}, {name}: {total(kernels, 'count')} launches a layer, {total(kernels, 'us')} us")
        for kernel in kernels[:rows]:
            say(f"{kernel['count']:8.2f} {kernel['us']:9.2f} us  {kernel['name'][:90]}")
        if "step_ms" in side:
            say(f"step {side['step_ms']} ms, replay against launch {side['replay_rel_error']:.1e}")
        errors = rel_errors(side["logits"], expected)
        same = int((side["logits"].argmax(-1) == expected.argmax(-1)).sum())
        say(
            f"relative error of a row of logits beside float32 {errors['median']:.1e}, worst "
            f"{errors['worst']:.1e}; same best tokens {same} of {batch}"
        )


def rel_errors(got: Tensor, expected: Tensor) -> dict[str, float]:
    """Return the relative error of a row [V] of logits: the median, and the worst, where a router may tie."""
    rows = (got - expected).norm(dim=1) / expected.norm(dim=1)
    return {"median": float(rows.median()), "worst": float(rows.max())}


def total(kernels: Iterable[dict[str, Any]], key: str) -> float:
    """Add up one number of all kernels."""
    return round(sum(kernel[key] for kernel in kernels), 2)


def document(
    grid: ProcessGrid, sides: dict[str, dict[int, dict[str, Any]]], expected: dict[int, Tensor]
) -> dict[str, Any]:
    """Return what ``--json`` writes."""
    on_gpu = grid.device.type == "cuda"
    rows = [
        {
            "side": name,
            "batch": batch,
            "logits_rel_error": rel_errors(row["logits"], expected[batch]),
            **{k: v for k, v in row.items() if k != "logits"},
        }
        for name, batches in sides.items()
        for batch, row in batches.items()
    ]
    device = torch.cuda.get_device_name() if on_gpu else "cpu"
    return {"device": device, "torch": torch.__version__, "rows": rows}


def say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
