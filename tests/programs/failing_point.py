"""A scaling study whose measurement fails on the first two ranks; start it on three."""

from typing import Any

from xpar.comm import World, run
from xpar.comm.handshake import DesyncError
from xpar.engine.bench.scaling.points import choose_points
from xpar.engine.bench.scaling.study import run_study


class FailingStep:
    def measure(self, mode: str) -> dict[str, Any]:
        raise DesyncError("out of step")

    def manifest(self) -> dict[str, Any]:
        return {}

    def close(self) -> None:
        pass


world = World.attach()
run(lambda: run_study(world, choose_points(world.node_of, [2]), lambda inside: FailingStep(), ["strong"]))
