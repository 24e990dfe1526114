"""Small operations of a whole model in fewer launches: norms, rotary embeddings and routers, on GPUs.

A decoding step of few tokens is mostly the cost of its launches, even where it is recorded. Every module is
asked what it computes, and one that agrees with no fused form stays as it is.
"""

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from xpar.comm.grid import ProcessGrid
from xpar.engine.models.fused_norms import fuse_norms
from xpar.engine.models.fused_rotary import Rotate, fuse_rotary, rotate_by_definition
from xpar.engine.models.fused_routers import fuse_routers
from xpar.kernels.gpu.availability import has_triton

log = logging.getLogger("xpar.models")


@dataclass(frozen=True)
class FusedModules:
    """The numbers of modules of a model with fused operations."""

    norms: int
    rotary: int
    routers: int


def why_not_fused(grid: ProcessGrid, dtype: torch.dtype, exact: bool) -> str | None:
    """Return why operations of a model stay apart, or None; the same on all ranks of ``grid``. Collective."""
    if grid.device.type != "cuda":
        return "on host processors they cost no launches"
    found: list[bool] = grid.world.comm.all_gather_object(has_triton())
    if exact:
        return "exact mode computes as transformers does"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"{str(dtype).removeprefix('torch.')} is for comparisons"
    return None if all(found) else "triton is not installed on every rank"


def fuse_operations(
    model: nn.Module, experts: Iterable[str], dtype: torch.dtype, rotate: Rotate = rotate_by_definition
) -> FusedModules:
    """Fuse the small operations of ``model``, which is loaded, in place.

    Fused routers keep the gates that they have now: weights must not change afterwards, nor move.

    Args:
        model: transformers' model.
        experts: The names of its modules of experts that xpar computes, routed by the model.
        dtype: That of the computation; modules with other weights stay as they are.
        rotate: Rotates queries and keys.
    """
    blocks = (model.get_submodule(name.rpartition(".")[0]) for name in experts)
    return FusedModules(fuse_norms(model, dtype), fuse_rotary(model, rotate), fuse_routers(blocks, dtype))


def fuse_loaded(
    model: Any, experts: Iterable[str], grid: ProcessGrid, dtype: torch.dtype, exact: bool
) -> None:
    """Fuse the small operations of a model that ``grid`` has loaded, where that helps; log it. Collective.

    The arguments are those of :func:`why_not_fused` and :func:`fuse_operations`.
    """
    if grid.device.type != "cuda":
        return
    if why := why_not_fused(grid, dtype, exact):
        log.info("small operations stay as transformers has them: %s", why)
        return
    from xpar.kernels.gpu.rotary import rotate

    done = fuse_operations(model, experts, dtype, rotate)
    log.info(
        "small operations in one launch each: %d norms, %d rotary embeddings, %d routers",
        done.norms,
        done.rotary,
        done.routers,
    )
