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
from xpar.kernels.contracts import Activation, ExpertSpec
from xpar.kernels.gpu.availability import build


def main() -> None:
    g = torch.Generator("cuda").manual_seed(torch.seed() % 2**31)
    say("rows", checks.check_rows(g))
    say("router", checks.check_router(g))
    say("sorts", checks.check_sorts(g))
    # Two experts for 1200 tokens of two: hundreds of rows each, beside some with few and one with none.
    spec = ExpertSpec(6, 200, 136, torch.bfloat16, Activation("silu"), "cuda", bias=True)
    weights, kernel = random_weights(spec, g), build(spec)
    load_experts(kernel, weights)
    for name, table in checks.forms_of(kernel.table).items():
        kernel.table = table
        for tokens in (1, 33, 300, 1200):
            x = random_input(spec, tokens, 2, 8, g, skewed=True)
            expected = checks.expected_rows(spec, weights, x, torch.arange(tokens, device="cuda"))
            error = checks.require_near(kernel.compute(x), expected, spec.dtype, "output")
            say(f"{tokens} tokens, {name}", error)
    torch.cuda.synchronize()


def say(what: str, error: str) -> None:
    sys.stdout.write(f"{what}: {error}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
