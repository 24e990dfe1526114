"""Import everything of the kernels that must not need Triton, in a process where it cannot be imported."""

import sys

sys.modules["triton"] = None  # type: ignore[assignment]

import xpar.kernels
import xpar.kernels.gpu.availability
import xpar.kernels.gpu.tile_tables  # noqa: F401
