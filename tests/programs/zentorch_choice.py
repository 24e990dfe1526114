"""Explain the choice of a kernel, and print whether that loaded zentorch or imported its package."""

import sys

import torch

from xpar.kernels import Activation, ExpertSpec, choose_kernel

choose_kernel(ExpertSpec(8, 128, 192, torch.bfloat16, Activation("silu"))).explain()
is_loaded = hasattr(torch.ops.zentorch, "zentorch_fused_moe")
sys.stdout.write(f"{is_loaded or 'zentorch' in sys.modules}\n")
