"""Launch each GPU kernel on small shapes, for compute-sanitizer.

Not part of the test run, which needs no GPU.

    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck python tests/gpu/sanitize.py

Run it once without the sanitizer first: compiling under it takes minutes. Without torch's cache every tensor
has its own allocation, so that a step past one is seen.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / ".typing")]

import torch

from xpar.engine.bench.kernels import checks
from xpar.engine.bench.kernels.cases import load_experts, random_input, random_weights
from xpar.engine.models.fused_rotary import rotate_by_definition
from xpar.kernels.contracts import Activation, ExpertSpec
from xpar.kernels.gpu.availability import build
from xpar.kernels.gpu.rotary import rotate
from xpar.kernels.gpu.small_steps import check_routing, count_slots, write_spans


def main() -> None:
    g = torch.Generator("cuda").manual_seed(torch.seed() % 2**31)
    say("rows", checks.check_rows(g))
    say("router", checks.check_router(g))
    say("sorts", checks.check_sorts(g))
    # Two experts for 1200 tokens of two: hundreds of rows each, beside some with few and one with none.
    spec = ExpertSpec(6, 200, 136, torch.bfloat16, Activation("silu"), "cuda", bias=True)
    weights, kernel = random_weights(spec, g), build(spec)
    load_experts(kernel, weights)
    for name, table in checks.forms_of(kernel.machine).items():
        kernel.table = table
        for tokens in (1, 33, 300, 1200):
            x = random_input(spec, tokens, 2, 8, g, skewed=True)
            expected = checks.expected_rows(spec, weights, x, torch.arange(tokens, device="cuda"))
            error = checks.require_near(kernel.compute(x), expected, spec.dtype, "output")
            say(f"{tokens} tokens, {name}", error)
    check_small_steps(g)
    torch.cuda.synchronize()


def check_small_steps(g: torch.Generator) -> None:
    """Launch the small operations of a decoding step, odd sizes included, and compare them with torch's."""
    for tokens, heads, width in ((1, 1, 24), (37, 5, 96), (300, 16, 128)):
        q, k = (
            torch.randn(1, heads + n, tokens, width, generator=g, device="cuda").bfloat16() for n in (2, 0)
        )
        cos, sin = torch.randn(2, 1, tokens, width, generator=g, device="cuda").bfloat16()
        got = rotate(q, k, cos, sin, False)
        require_equal(got, rotate_by_definition(q, k, cos, sin, False), f"rotation of {tokens} tokens")
        ids = torch.randint(-1, 9, (tokens, 3), generator=g, device="cuda")
        weights = torch.rand(tokens, 3, generator=g, device="cuda").bfloat16()
        routing = check_routing(ids, weights, None, 9)
        require_equal((routing.topk_ids, routing.topk_weights), (ids.int(), weights.float()), "routing")
        counted = torch.zeros((), dtype=torch.int64, device="cuda")
        count_slots(routing.topk_ids, counted)
        require_equal((counted,), ((ids >= 0).sum(),), "count of slots")
        keys, values = torch.zeros(2, tokens + 5, heads, width, device="cuda", dtype=torch.bfloat16)
        places = torch.randperm(tokens + 5, generator=g, device="cuda")[:tokens]
        write_spans(k[0], k[0].neg(), keys, values, places)
        rows = k[0].transpose(0, 1)
        require_equal((keys[places], values[places]), (rows, -rows), "written spans")
    say("small steps", "same bits")


def require_equal(got: tuple[torch.Tensor, ...], expected: tuple[torch.Tensor, ...], what: str) -> None:
    if not all(torch.equal(a, b) for a, b in zip(got, expected, strict=True)):
        raise AssertionError(f"{what}: other bits")


def say(what: str, error: str) -> None:
    sys.stdout.write(f"{what}: {error}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
