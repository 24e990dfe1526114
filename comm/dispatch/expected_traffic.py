"""The expected rows of a token whose k experts are uniform and distinct."""

import math
from collections.abc import Sequence

from xpar.comm.partition import split_sizes


def expected_destinations(num_experts: int, top_k: int, held: int) -> float:
    """Return the chance that a token has a held expert: ``1 - C(E - held, k) / C(E, k)``."""
    return 1 - math.comb(num_experts - held, top_k) / math.comb(num_experts, top_k)


def expected_rows(num_experts: int, top_k: int, ranks: int) -> float:
    """Return the expected rows of a token that sends one to each rank with its experts.

    That is ``R (1 - C(E - E/R, k) / C(E, k))`` if R divides E; blocks may differ by one here.
    """
    return sum(expected_destinations(num_experts, top_k, held) for held in split_sizes(num_experts, ranks))


def expected_crossings(
    num_experts: int, top_k: int, etp: int, node_of: Sequence[int], by_node: bool
) -> float:
    """Return the expected rows of a token that leave its node, averaged over all ranks.

    ``node_of``: of each rank, of which ``etp`` in sequence slice the same experts. ``by_node``: a token sends
    one row to each node that holds any of its experts, rather than to each rank.
    """
    held = [n for n in split_sizes(num_experts, len(node_of) // etp) for _ in range(etp)]
    on_node = {node: [h for h, n in zip(held, node_of, strict=True) if n == node] for node in node_of}

    def rows(node: int) -> float:
        parts = [sum(on_node[node][::etp])] if by_node else on_node[node]
        return sum(expected_destinations(num_experts, top_k, part) for part in parts)

    return sum(rows(node) for home in node_of for node in on_node if node != home) / len(node_of)
