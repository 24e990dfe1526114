"""The optional package zentorch: the check whether it can be used, and its operators without its import."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from xpar.kernels.cpu.host import multiplies_bfloat16

# The oldest release whose packing was checked; earlier ones also refuse a batch that meets only one expert.
_OLDEST = (2, 13, 0, 2)
# zentorch reads these once, at its first call in the process: one packing, in place, and no warnings on
# stderr.
_SETTINGS = {"ZENDNNL_GRP_MATMUL_ALGO": "3", "ZENDNNL_API_LOG_LEVEL": "1"}


def why_unavailable() -> str | None:
    """Return why zentorch cannot be used on this machine, or None; does not import it."""
    if find_spec("zentorch") is None:
        return "zentorch is not installed (pip install 'xpar[zen]')"
    try:
        version = metadata.version("zentorch")
    except metadata.PackageNotFoundError:
        return "zentorch comes from another distribution (zentorch-weekly), which was not checked"
    if tuple(int(part) for part in version.split(".")[:4] if part.isdigit()) < _OLDEST:
        return f"zentorch {version} is older than {'.'.join(map(str, _OLDEST))}"
    if version.split(".")[:2] != torch.__version__.split(".")[:2]:
        return f"zentorch {version} is built for another torch than {torch.__version__}"
    if not multiplies_bfloat16():
        return "this processor has no avx512_bf16"
    return None


@cache
def load_operators() -> Any:
    """Load zentorch's library and return its operators, ``torch.ops.zentorch``.

    The package itself is not imported: beyond loading this library it imports torch's compiler and registers
    rewrites for it, which takes every rank 3 seconds of processor time (zentorch 2.13.0.2).
    """
    found = find_spec("zentorch")
    if found is None or found.origin is None:
        raise ImportError("zentorch is not installed (pip install 'xpar[zen]')")
    operators: Any = torch.ops  # a part of torch without types
    with settings():
        operators.load_library(Path(found.origin).with_name("libzentorch.so"))
    return operators.zentorch


@contextmanager
def settings() -> Iterator[None]:
    """Set zentorch's environment variables while it reads them, and restore the environment."""
    before = dict(os.environ)
    os.environ.update(_SETTINGS)
    try:
        yield
    finally:
        for name in os.environ.keys() - before.keys():
            del os.environ[name]
        os.environ.update(before)
