"""The dispatchers as parameters of tests that run on one node and on several."""

from collections.abc import Iterable
from typing import Any

import pytest

from xpar.comm.dispatch.choose import DISPATCHERS

MOVERS = [cls.name for cls in DISPATCHERS if cls.name not in ("replicated", "hierarchical")]
"""Those that do something of their own on one node, too; ``hierarchical`` has tests of its own."""
SHARING = ("shared-memory",)
"""Those that serve ranks of one node only."""


def all_dispatchers(**mark: Any) -> list[Any]:
    """Every dispatcher that moves tokens; those of :data:`SHARING` only where all ranks are on one node.

    ``mark``: the options of the mark ``mpi`` of the module, which a parameter's mark replaces.
    """
    one_node = pytest.mark.mpi(max_nodes=1, **mark)
    return [pytest.param(name, marks=one_node) if name in SHARING else name for name in MOVERS]


def pairs(cases: Iterable[Any], names: Iterable[Any]) -> list[Any]:
    """Every case with every dispatcher, which keeps its marks."""
    return [
        (case, name) if isinstance(name, str) else pytest.param(case, *name.values, marks=name.marks)
        for case in cases
        for name in names
    ]


def fitting(num_nodes: int) -> list[str]:
    """The names of those that serve a group on ``num_nodes`` nodes."""
    if num_nodes == 1:
        return MOVERS
    return ["hierarchical", *(name for name in MOVERS if name not in SHARING)]
