"""Explain the choice of a kernel, and print whether that imported zentorch."""

import sys

import torch

from xpar.kernels import Activation, ExpertSpec, choose_kernel

choose_kernel(ExpertSpec(8, 128, 192, torch.bfloat16, Activation("silu"))).explain()
sys.stdout.write(f"{'zentorch' in sys.modules}\n")
