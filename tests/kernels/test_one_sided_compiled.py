"""The launches of a one-sided exchange, compiled for GPUs that are not here: wide stores, memory order, no
spills."""

import re

import pytest
import torch
from triton_compiler import Compiled, compiling

from xpar.kernels.gpu.one_sided import Exchange, Peers, Step, window_bytes

SIZES = ((2, 7168, 16), (4, 4096, 700), (8, 2048, 16))
NAMES = {"dispatch_kernel", "home_kernel", "weighted_home_kernel", "rank_sum_kernel", "abort_kernel"}
WAITING = NAMES - {"rank_sum_kernel", "abort_kernel"}


def exchange_of(ranks: int, width: int, tokens: int, slots: bool = False, checks: bool = False) -> Exchange:
    """An exchange of rank 1 in memory that nobody reads."""
    step = Step((tokens,) * ranks, 8, 2 * width, width, torch.bfloat16, slots)

    def zeros(n: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
        return torch.zeros(n, dtype=dtype)

    nbytes = window_bytes(step.front_bytes, step.back_bytes)
    peers = Peers(
        1,
        zeros(nbytes, torch.uint8),
        zeros(ranks, torch.int64),
        zeros(2),
        zeros(2),
        zeros(1, torch.int64),
        zeros(6),
        step.front_bytes,
        132,
        checks,
    )
    return Exchange(peers, step)


def launches(
    arch: int, ranks: int, width: int, tokens: int, monkeypatch: pytest.MonkeyPatch, checks: bool = False
) -> list[Compiled]:
    """What one step compiles to, with the inline assembly that GPUs get."""
    constants = Exchange._constants
    monkeypatch.setattr(Exchange, "_constants", lambda self: constants(self) | {"ASM": True})
    exchange, unsummed = (exchange_of(ranks, width, tokens, slots, checks) for slots in (False, True))
    ids, weights = torch.zeros(tokens, 8, dtype=torch.int32), torch.ones(tokens, 8)
    table, x = torch.zeros(65, dtype=torch.int32), torch.zeros(tokens, width, dtype=torch.bfloat16)
    slots = torch.zeros(ranks * tokens * 8, width, dtype=torch.bfloat16)
    with compiling(arch) as found:
        exchange.dispatch(x, ids, weights, table, table)
        exchange.rows_home(slots[: ranks * tokens])
        exchange.weighted_home(slots)
        unsummed.rows_home(slots)
        exchange.sum_ranks(ids, table, shared=x, residual=x, bias=torch.zeros(width))
        exchange.peers.abort()
    return found


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("arch", [80, 90, 100])
def test_compiles_to_what_the_protocol_needs(
    arch: int, sizes: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = launches(arch, *sizes, monkeypatch)
    assert {kernel.name for kernel in found} == NAMES
    for kernel in found:
        assert kernel.spilt == 0, f"{kernel.name}: {kernel.spilt} bytes a thread"
        if kernel.name != "abort_kernel":
            assert "ld.global.v4.b32" in kernel.ptx and "st.global.v4.b32" in kernel.ptx, kernel.name
        if kernel.name in WAITING:
            check_protocol(kernel)
        if arch == 90:
            assert ".target sm_90a" in kernel.ptx


def test_compiles_with_labels_beside_the_flags(monkeypatch: pytest.MonkeyPatch) -> None:
    """As with ``--debug-collectives``; the order of the protocol stays."""
    for kernel in launches(90, *SIZES[0], monkeypatch, checks=True):
        assert kernel.spilt == 0
        if kernel.name in WAITING:
            check_protocol(kernel)


def check_protocol(kernel: Compiled) -> None:
    """Rows, barrier, count at GPU scope, flag released at system scope, acquire at system scope.

    In this order.
    """
    order = [
        r"st\.global\.v4\.b32",
        r"bar\.sync",
        r"atom\.global\.gpu\.acq_rel\.add",
        r"atom\.global\.sys\.release\.exch",
        r"ld\.acquire\.sys\.global\.u32",
    ]
    places = [[m.start() for m in re.finditer(pattern, kernel.ptx)] for pattern in order]
    assert all(places), (
        f"{kernel.name}: no {[p for p, found in zip(order, places, strict=True) if not found]}"
    )
    count, flag, wait = places[2][0], places[3][0], places[4][0]
    assert max(places[0]) < count < flag < wait
    assert any(max(places[0]) < at < count for at in places[1])
    assert not any(at > wait for at in places[1]), f"{kernel.name}: a barrier behind the waiting"


def test_batch_sizes_share_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another number of tokens compiles nothing new, as long as it is few or many."""
    with monkeypatch.context() as patch:
        first = [(k.name, k.ptx) for k in launches(90, 2, 2048, 16, patch)]
    with monkeypatch.context() as patch:
        assert first == [(k.name, k.ptx) for k in launches(90, 2, 2048, 1, patch)]
