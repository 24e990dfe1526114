"""The options of one MoE layer: what a caller may choose, as frozen values."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from xpar.engine.formats.quantised_on_load import Quantisation
from xpar.engine.layer.shared_expert_overlap import SharedOrder

Depth = Literal["auto", "steps", "one-call"]
DEPTHS: tuple[Depth, ...] = ("auto", "steps", "one-call")
Activations = Literal["auto", "quantised", "exact"]
ACTIVATIONS: tuple[Activations, ...] = ("auto", "quantised", "exact")


@dataclass(frozen=True)
class ExpertOptions:
    """The options of routed experts.

    Attributes:
        dispatcher: Name of a dispatcher of :mod:`xpar.comm.dispatch`, or ``auto``.
        kernel: Name of an expert kernel of :mod:`xpar.kernels.registry`, or ``auto``.
        exact: Slot outputs travel unsummed and are added in slot order where their token lives, by kernels
            whose rows do not depend on each other. The bits of the result then do not depend on the number of
            ranks.
        activations: ``quantised`` quantises the inputs of experts as the checkpoint says, before they travel;
            ``exact`` leaves them as they are; ``auto`` quantises on GPUs, outside exact mode and float32.
        quantisation: The formats that weights in floats are quantised to while they are read, or None.
    """

    dispatcher: str = "auto"
    kernel: str = "auto"
    exact: bool = False
    activations: Activations = "auto"
    quantisation: Quantisation | None = field(default=None, kw_only=True)


@dataclass(frozen=True)
class LayerOptions(ExpertOptions):
    """The options of a whole layer.

    Attributes:
        sequence_parallel: The ranks of a tensor-parallel group give different tokens, and get the outputs of
            their own.
        shared_order: The moment at which the shared experts compute.
        tiles: A file of tile shapes that ``xpar tune`` wrote, for kernels on GPUs.
        fuse_shared_experts: Compute the shared experts as slots of the routed product.
        depth: ``steps`` runs the stages of the layer one by one; ``one-call`` runs route, compute and combine
            in one call of the kernel; ``auto`` does that for the numbers of tokens at which it was measured
            to be faster.
    """

    sequence_parallel: bool = False
    shared_order: SharedOrder = SharedOrder.AUTO
    tiles: Path | None = None
    fuse_shared_experts: bool = False
    depth: Depth = "auto"


DEFAULT = LayerOptions()
