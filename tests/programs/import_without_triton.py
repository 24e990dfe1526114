"""Import the kernels' modules that must not need Triton, where it cannot be imported."""

import sys

sys.modules["triton"] = None  # type: ignore[assignment]

import xpar.kernels
import xpar.kernels.gpu.availability
import xpar.kernels.gpu.default_tables  # noqa: F401
