"""Triton's interpreter for these tests, chosen before Triton is imported, so in processes of their own.

``tests/kernels/test_gpu_interpreted.py`` starts them.
By hand: ``TRITON_INTERPRET=1 pytest tests/kernels/gpu``.
"""

import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") == "1":
    import triton_interpreter

    triton_interpreter.install()
else:
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """Fill new memory with NaN, or numbers that are no index, so that values a kernel does not write show."""
    empty, new_empty = torch.empty, torch.Tensor.new_empty

    def fill(tensor):
        if tensor.dtype == torch.uint8:
            return tensor.fill_(0x7F)  # NaN of e4m3
        if tensor.dtype == torch.bool:
            return tensor.fill_(True)
        if tensor.is_floating_point():
            return tensor.fill_(float("nan"))
        return tensor.fill_(max(-(10**6), torch.iinfo(tensor.dtype).min))

    monkeypatch.setattr(torch, "empty", lambda *a, **k: fill(empty(*a, **k)))
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda self, *a, **k: fill(new_empty(self, *a, **k)))
