"""A layer as the subject of a sweep: which tokens each mode has, and the groups that are made and given back."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from xpar.comm.failure import AgreedError
from xpar.comm.grid import ProcessGrid
from xpar.comm.world import World
from xpar.engine.bench.scaling.layer import LayerCheck, LayerPoint
from xpar.engine.bench.scaling.layer_source import LayerSource


@dataclass(frozen=True)
class Axes:
    """How the ranks of every point are arranged; what is not given follows from their number."""

    tp: int | None = None
    ep: int | None = None
    etp: int | None = None
    device: str = "cpu"
    transport: str = "auto"

    def grid(self, world: World) -> ProcessGrid:
        """The grid of ``world``; collective, AgreedError where it cannot be."""
        return ProcessGrid.create(
            world, tp=self.tp, ep=self.ep, etp=self.etp, device=self.device, transport=self.transport
        )


@dataclass(frozen=True)
class LayerStudy:
    """``tokens``: of the whole point in strong mode. ``per_rank``: of each rank in weak mode. ``check``: on rank 0 of the job."""

    subject: LayerSource
    axes: Axes
    tokens: int
    per_rank: int
    seconds: float
    seed: int
    check: LayerCheck | None

    def __call__(self, world: World) -> "LayerStudyStep":
        grid = self.axes.grid(world)
        try:
            return LayerStudyStep(self, LayerPoint(self.subject, grid, self.seconds, self.seed))
        except AgreedError:
            grid.close()
            raise


class LayerStudyStep:
    """See :class:`~xpar.engine.bench.scaling.study.StudyStep`."""

    def __init__(self, study: LayerStudy, point: LayerPoint) -> None:
        self.study, self.point = study, point
        self._seen: dict[int, tuple[dict[str, Any], Tensor]] = {}

    def measure(self, mode: str) -> dict[str, Any]:
        """Where both modes have the same tokens, they are measured once."""
        ranks = self.point.grid.world.size
        tokens = self.study.tokens if mode == "strong" else self.study.per_rank * ranks
        if tokens not in self._seen:
            self._seen[tokens] = self.point.measure(tokens)
        figures, output = self._seen[tokens]
        verdict = {} if self.study.check is None else self.study.check.judge(output)
        return {**figures, **verdict, "threads": torch.get_num_threads()}

    def manifest(self) -> dict[str, Any]:
        return self.point.manifest()

    def close(self) -> None:
        self.point.grid.close()
