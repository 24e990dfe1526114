"""Build zentorch's experts, and fail if that changed torch or the environment, or imported slow modules."""

import os
import sys

import torch

from xpar.kernels import Activation, ExpertSpec, choose_kernel

X, WEIGHT = torch.randn(9, 640), torch.randn(320, 640)


def products() -> list[torch.Tensor]:
    return [torch.nn.functional.linear(X.to(d), WEIGHT.to(d)) for d in (torch.float32, torch.bfloat16)]


def settings() -> tuple[object, ...]:
    return (
        torch.get_num_threads(),
        torch.get_default_dtype(),
        torch.backends.mkldnn.enabled,
        dict(os.environ),
    )


before = products(), settings()
modules = set(sys.modules)
spec = ExpertSpec(4, 128, 192, torch.bfloat16, Activation("silu"))
kernel = choose_kernel(spec, "zentorch").chosen.build(spec)
for expert in range(4):
    kernel.load_expert(expert, torch.randn(384, 128), torch.randn(128, 192))
assert all(map(torch.equal, before[0], products()))
assert before[1] == settings()
slow = [m for m in ("zentorch", "torch._dynamo", "torch._inductor") if m in sys.modules.keys() - modules]
assert not slow, slow
