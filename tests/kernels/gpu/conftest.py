"""These tests run Triton's interpreter, which has to be chosen before Triton is imported: in processes of their own.

``tests/kernels/test_gpu_interpreted.py`` starts them; by hand: ``TRITON_INTERPRET=1 pytest tests/kernels/gpu``.
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
    """New memory holds NaN, or numbers that are no index: what a kernel does not write shows."""
    empty, new_empty = torch.empty, torch.Tensor.new_empty

    def fill(tensor):
        return tensor.fill_(float("nan") if tensor.is_floating_point() else -(10**6))

    monkeypatch.setattr(torch, "empty", lambda *a, **k: fill(empty(*a, **k)))
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda self, *a, **k: fill(new_empty(self, *a, **k)))
