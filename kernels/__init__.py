"""Arithmetic and row moving on one device: experts, dense products, attention, sums of rows.

Nothing here knows a rank, a group or a checkpoint. :func:`choose_kernel` takes the fastest expert
kernel that serves an :class:`ExpertSpec` on this machine and says why the others do not;
:mod:`xpar.kernels.reference` defines what all of them compute. Importing this package needs neither Triton
nor zentorch nor a GPU. Shapes use the letters that :mod:`xpar.kernels.contracts` defines.
"""

from xpar.kernels.activations import activate
from xpar.kernels.choice import Choice
from xpar.kernels.contracts import (
    Activation,
    ActivationName,
    ExpertInput,
    ExpertKernel,
    ExpertSpec,
    FusedRoutingKernel,
    RouteSpec,
    Routing,
    require_finite,
)
from xpar.kernels.cpu.attention import Attention
from xpar.kernels.cpu.linear import LINEAR_KERNELS, LinearEntry, LinearKernel, choose_linear
from xpar.kernels.gpu.availability import use_table
from xpar.kernels.reference import ReferenceExperts, expert_slots, mlp, routed_experts
from xpar.kernels.registry import KERNELS, KernelEntry, choose_kernel
from xpar.kernels.rows import (
    ExpertGroups,
    active_rows,
    gather_rows,
    group_by_expert,
    sum_rows,
    sum_runs,
    weighted_sum,
)
from xpar.kernels.stable_topk import stable_topk

__all__ = [
    "KERNELS",
    "LINEAR_KERNELS",
    "Activation",
    "ActivationName",
    "Attention",
    "Choice",
    "ExpertGroups",
    "ExpertInput",
    "ExpertKernel",
    "ExpertSpec",
    "FusedRoutingKernel",
    "KernelEntry",
    "LinearEntry",
    "LinearKernel",
    "ReferenceExperts",
    "RouteSpec",
    "Routing",
    "activate",
    "active_rows",
    "choose_kernel",
    "choose_linear",
    "expert_slots",
    "gather_rows",
    "group_by_expert",
    "mlp",
    "require_finite",
    "routed_experts",
    "stable_topk",
    "sum_rows",
    "sum_runs",
    "use_table",
    "weighted_sum",
]
