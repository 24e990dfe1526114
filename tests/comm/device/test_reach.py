"""Which ranks try to map each other's GPU memory, and the reason against each that do not."""

from dataclasses import replace

import pytest

from xpar.comm.device.peer_memory import PeerAccess
from xpar.comm.device.reach import ReachFacts, why_slow, why_unreachable

ONE, TWO = (ReachFacts("node boot", uuid, "580.1", ()) for uuid in ("GPU-1", "GPU-2"))


@pytest.mark.parametrize(
    ("facts", "reason"),
    [
        ((ONE, TWO), None),
        ((ONE, replace(TWO, unreachable=("GPU-7",))), None),
        ((ONE, replace(TWO, host="other boot")), "the ranks are on 2 hosts"),
        ((ONE, replace(TWO, host="node later boot")), "the ranks are on 2 hosts"),
        ((ONE, replace(TWO, driver=None)), "different NVIDIA drivers: 580.1, unknown"),
        ((ONE, replace(TWO, unreachable=("GPU-1",))), "the GPU of rank 1 cannot address that of rank 0"),
        ((ONE,) * 65, "65 ranks; an exchange has flags for at most 64"),
    ],
    ids=str,
)
def test_who_is_refused(facts: tuple[ReachFacts, ...], reason: str | None) -> None:
    found = why_unreachable(facts)
    assert found is None if reason is None else found is not None and reason in found


def test_ranks_that_share_a_gpu_are_slow() -> None:
    assert why_slow((ONE, TWO)) is None
    assert "ranks 0, 2 share GPU GPU-1" in str(why_slow((ONE, TWO, ONE)))


def test_access_explains_itself() -> None:
    refused = PeerAccess(None, (("a", "no driver"), ("b", "no sockets")))
    assert refused.refusal == "a: no driver; b: no sockets"
    assert PeerAccess("b", (("a", "no driver"),), "slowly").explain().splitlines() == [
        "b: chosen, but slowly",
        "a: passed over, no driver",
    ]
