"""Rows that are expected to move, against rows that random routing makes."""

import pytest
import torch

from xpar.comm.dispatch.base import destination_mask
from xpar.comm.dispatch.expected_traffic import expected_crossings
from xpar.comm.dispatch.hierarchical import node_mask, node_of_owners, rail_peers, ranks_by_node
from xpar.comm.placement import Placement

E, K, TOKENS = 256, 8, 4000


def counted(node_of: list[int], placement: Placement, topk_ids: torch.Tensor, by_node: bool) -> float:
    """Count the rows that cross as dispatchers do, for tokens spread evenly over the ranks."""
    nodes = torch.tensor(node_of)
    goes = destination_mask(topk_ids, placement)
    if by_node:
        on_node = node_of_owners(ranks_by_node(node_of), placement)[placement.owners(topk_ids)]
        goes, nodes = node_mask(on_node, max(node_of) + 1), torch.arange(max(node_of) + 1)
    home = torch.tensor(node_of)[torch.arange(topk_ids.shape[0]) % len(node_of)]
    return float((goes & (nodes[:, None] != home)).sum()) / topk_ids.shape[0]


@pytest.mark.parametrize("nodes, saved", [(2, 3.3), (4, 2.0), (8, 1.45)])
def test_bytes_between_nodes_of_eight(nodes: int, saved: float, fresh_seed: int) -> None:
    """The design's figures for E = 256, k = 8."""
    node_of = [r // 8 for r in range(8 * nodes)]
    generator = torch.Generator().manual_seed(fresh_seed)
    topk_ids = torch.rand(TOKENS, E, generator=generator).topk(K).indices
    flat, ours = (expected_crossings(E, K, 1, node_of, by_node=by_node) for by_node in (False, True))
    assert flat / ours == pytest.approx(saved, rel=0.02)
    placement = Placement.blocks(E, 8 * nodes)
    for by_node, expected in ((False, flat), (True, ours)):
        assert counted(node_of, placement, topk_ids, by_node) == pytest.approx(expected, rel=0.05)


def test_uneven_nodes_and_sliced_experts(fresh_seed: int) -> None:
    node_of, etp = [0, 0, 0, 0, 1, 1], 2
    generator = torch.Generator().manual_seed(fresh_seed)
    topk_ids = torch.rand(3 * TOKENS, 7, generator=generator).topk(2).indices
    placement = Placement.blocks(7, 3, etp)
    for by_node in (False, True):
        expected = expected_crossings(7, 2, etp, node_of, by_node=by_node)
        assert counted(node_of, placement, topk_ids, by_node) == pytest.approx(expected, rel=0.05)


def test_rails_wrap_where_a_node_has_fewer_ranks() -> None:
    members = ranks_by_node([0, 0, 0, 1, 1, 2])
    assert members == [range(3), range(3, 5), range(5, 6)]
    assert [rail_peers(members, r) for r in range(6)] == [
        [0, 3, 5], [1, 4, 5], [2, 3, 5], [0, 3, 5], [1, 4, 5], [0, 3, 5],
    ]  # fmt: skip
