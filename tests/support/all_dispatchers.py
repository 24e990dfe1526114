"""The dispatchers as parameters of tests that run on one node and on several."""

from collections.abc import Iterable
from typing import Any

import pytest

from xpar.comm.dispatch.choose import DISPATCHERS

MOVERS = [
    cls.name
    for cls in DISPATCHERS
    if cls.capabilities.moves_rows(num_nodes=1) and "cpu" in cls.capabilities.devices
]
"""Names of the dispatchers that move rows on one node; ``hierarchical`` has tests of its own."""
SINGLE_NODE = {cls.name for cls in DISPATCHERS if cls.capabilities.single_node}
"""Names of the dispatchers that serve ranks of one node only."""


def all_dispatchers(**mark: Any) -> list[Any]:
    """Return every name of ``MOVERS`` as a parameter.

    Those of ``SINGLE_NODE`` only run with all ranks on one node.

    ``mark``: the options of the module's mark ``mpi``, which a parameter's own mark replaces.
    """
    one_node = pytest.mark.mpi(max_nodes=1, **mark)
    return [pytest.param(name, marks=one_node) if name in SINGLE_NODE else name for name in MOVERS]


def pairs(cases: Iterable[Any], names: Iterable[Any]) -> list[Any]:
    """Return every case with every dispatcher, which keeps its marks."""
    return [
        (case, name) if isinstance(name, str) else pytest.param(case, *name.values, marks=name.marks)
        for case in cases
        for name in names
    ]


def fitting(num_nodes: int) -> list[str]:
    """Return the names of the dispatchers that move rows in a group on ``num_nodes`` nodes."""
    capabilities = {cls.name: cls.capabilities for cls in DISPATCHERS}
    return [
        n
        for n, c in capabilities.items()
        if c.moves_rows(num_nodes) and (num_nodes == 1 or not c.single_node)
    ]
