"""Epochs, deadlines, the abort word and growing windows of the one-sided exchange."""

import time
from dataclasses import replace

import pytest
import torch

from xpar.comm.communicator import Communicator
from xpar.comm.device import peer_window
from xpar.comm.device.mappings import HostMapping
from xpar.comm.device.peer_memory import PeerMemory, find_access
from xpar.comm.device.peer_window import PeerWindow
from xpar.comm.device.trial import try_exchange
from xpar.comm.failure import AgreedError
from xpar.comm.handshake import CollectiveError
from xpar.comm.watchdog.deadlines import Deadlines
from xpar.kernels.gpu.limits import label_of, layer_of
from xpar.kernels.gpu.one_sided import Exchange, Step

pytestmark = pytest.mark.mpi(deadline=120)
HOST = torch.device("cpu")
LAST_EPOCH = 2**31 - 1


def step_of(counts: tuple[int, ...], width: int = 24, slots: bool = False) -> Step:
    return Step(counts, len(counts), 4 * width, width, torch.float32, slots)


def everywhere(exchange: Exchange) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """ids, weights, owner, local of tokens that go to every rank: expert e is the only one of rank e."""
    size, tokens = exchange.peers.size, exchange.tokens
    experts = torch.arange(size, dtype=torch.int32)
    return experts.repeat(tokens, 1), torch.ones(tokens, size), experts, torch.zeros_like(experts)


def round_trip(exchange: Exchange, number: int, **added: torch.Tensor) -> None:
    """One step of values that tell step, rank and token apart; compares what arrives and what comes home."""
    peers, step = exchange.peers, exchange.step
    ids, weights, owner, local = everywhere(exchange)
    rows = [value_of(number, r, t, step.width) for r, t in enumerate(step.counts)]
    exchange.dispatch(rows[peers.rank], ids, weights, owner, local)
    assert torch.equal(exchange.rows(torch.float32), torch.cat(rows))
    exchange.rows_home(exchange.rows(torch.float32) * (peers.rank + 1))
    factor = sum(range(1, peers.size + 1))
    expected = rows[peers.rank] * factor + sum(added.values(), torch.zeros(()))
    assert torch.equal(exchange.sum_ranks(ids, owner, **added), expected)


def value_of(number: int, rank: int, tokens: int, width: int) -> torch.Tensor:
    return (torch.arange(tokens)[:, None] + 10 * rank + 100 * number + torch.zeros(width)).float()


def test_epochs_wrap(group: Communicator) -> None:
    """Flags are compared by their signed difference, which passes 2**31."""
    step = step_of((2,) * group.size)
    memory = PeerMemory.open(group, 1 << 20, HOST)
    peers = memory.peers(step.front_bytes, 10**6)
    peers.state.fill_(LAST_EPOCH - 2)
    for kind in (0, 1):
        peers.flags(kind).fill_(LAST_EPOCH - 2)
    group.barrier()
    exchange = Exchange(peers, step)
    for number in range(6):
        round_trip(exchange, number)
    assert peers.state.tolist() == [LAST_EPOCH - 2 + 6 - 2**32] * 2 and not memory.status.any()
    group.barrier()
    memory.close()


def test_stale_rows_are_not_taken_for_new_ones(group: Communicator, window: PeerWindow) -> None:
    """Steps of changing sizes and values on one window, whose parts overlap what an earlier step left
    there."""
    for number in range(8):
        counts = tuple((3 * r + number * (r + 2)) % 5 for r in range(group.size))
        round_trip(window.exchange(step_of(counts, width=(24, 40)[number % 2])), number)


def test_sum_with_addends(group: Communicator, window: PeerWindow, fresh_seed: int) -> None:
    """Output bias, shared experts' output and residual are added before the one rounding."""
    counts = tuple(r + 1 for r in range(group.size))
    generator = torch.Generator().manual_seed(fresh_seed + group.rank)
    exchange = window.exchange(step_of(counts))

    def whole(*shape: int) -> torch.Tensor:
        return torch.randint(-9, 9, shape, generator=generator).float()

    tokens = counts[group.rank]
    round_trip(exchange, 3, shared=whole(tokens, 24), residual=whole(tokens, 24), bias=whole(24))


@pytest.mark.parametrize("parts", ["bias", "shared", "bias shared", "bias shared residual"])
def test_a_sum_with_addends_has_the_bits_of_additions_afterwards(
    group: Communicator, window: PeerWindow, fresh_seed: int, parts: str
) -> None:
    """In float16, whose numbers the interpreter rounds as torch does."""
    tokens, width = 3, 40
    step = Step((tokens,) * group.size, group.size, 2 * width, width, torch.float16)
    exchange = window.exchange(step)
    ids, weights, owner, local = everywhere(exchange)
    generator = torch.Generator().manual_seed(fresh_seed + group.rank)

    def numbers(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    rows = numbers(tokens, width).half()
    exchange.dispatch(rows, ids, weights, owner, local)
    exchange.rows_home(exchange.rows(torch.float16) * (1 + group.rank))
    bias, shared, residual = numbers(width), numbers(tokens, width).half(), numbers(tokens, width).half()
    added = {"bias": bias, "shared": shared, "residual": residual}
    want = exchange.sum_ranks(ids, owner)
    for name in parts.split():
        want = (want.float() + added[name].float()).half()
    got = exchange.sum_ranks(ids, owner, **{name: added[name] for name in parts.split()})
    assert torch.equal(got, want)
    once = exchange.sum_ranks(ids, owner).float() + sum(added[name].float() for name in parts.split())
    assert len(parts.split()) == 1 or not torch.equal(got, once.half())  # roundings can be told apart


def test_the_window_grows_and_keeps_what_is_recorded(
    group: Communicator, window: PeerWindow, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Else a window has room for hundreds of rows at once, which take the interpreter long.
    monkeypatch.setattr(peer_window, "LEAST_BYTES", 8192)
    small, large = step_of((2,) * group.size), step_of((6 // group.size,) * group.size, width=3000)
    exchange = window.exchange(small)
    round_trip(exchange, 1)
    before = window.nbytes
    window._opened[-1].is_recorded = True
    round_trip(window.exchange(large), 2)
    assert window.nbytes > before + large.front_bytes + large.back_bytes
    for number in (3, 4):  # a recording goes on with the window that it was made with
        round_trip(exchange, number)
        round_trip(window.exchange(small), number)
    assert len(window._opened) == 2
    with pytest.raises(ValueError, match="does not fit into a window"):
        Exchange(window._opened[0].peers, large)


@pytest.mark.mpi(min_size=2, deadline=120)
def test_a_missing_rank_is_named_after_the_deadline(group: Communicator) -> None:
    """The kernel marks the window, tells the host and ends; later kernels pass at once.

    The window is refused.
    """
    window = PeerWindow(group, HOST, Deadlines(connect=30, finish=2))
    step = step_of((1,) * group.size)
    exchange = window.exchange(step)
    group.barrier()
    last = group.size - 1
    if group.rank != last:
        ids, weights, owner, local = everywhere(exchange)
        rows = value_of(1, group.rank, 1, step.width)
        begin = time.monotonic()
        exchange.dispatch(rows, ids, weights, owner, local, label=label_of(11))
        first = time.monotonic() - begin
        expected = (
            f"exchange 1 of layer 11: rank {last} has not sent its rows of tokens 2 s after rank {group.rank}"
        )
        assert expected in str(window.problem())
        with pytest.raises(CollectiveError, match="has not sent its rows of tokens"):
            window.check()
        begin = time.monotonic()
        exchange.dispatch(rows, ids, weights, owner, local)
        assert time.monotonic() - begin < 0.5 * first
    else:
        assert window.problem() is None
    group.barrier()
    window.close()


@pytest.mark.mpi(min_size=2, deadline=120)
def test_a_rank_that_gives_up_frees_the_others(group: Communicator) -> None:
    window = PeerWindow(group, HOST, Deadlines(connect=30, finish=10_000))
    exchange = window.exchange(step_of((1,) * group.size))
    group.barrier()
    if group.rank == 0:
        time.sleep(0.3)
        window.abort()
    else:
        ids, weights, owner, local = everywhere(exchange)
        exchange.dispatch(value_of(1, group.rank, 1, 24), ids, weights, owner, local)
        assert window.problem() == f"one-sided exchange of group {group.name}: rank 0 gave up the exchange"
    group.barrier()
    window.close()


# -- opening
# ------------------------------------------------------------------------------------------------------


class Broken(HostMapping):
    """A way that fails on the last rank."""

    way = "broken"

    def __init__(self, group: Communicator, nbytes: int, device: torch.device) -> None:
        from xpar.comm.failure import agreed

        agreed(group, lambda: 1 // (group.rank + 1 - group.size) if group.size > 1 else 1 // 0, "broken")


class Apart(HostMapping):
    """A way that opens memory which no other rank sees."""

    way = "apart"

    def __init__(self, group: Communicator, nbytes: int, device: torch.device) -> None:
        super().__init__(group, nbytes, device)
        if group.size > 1:
            self.mine = torch.zeros(2 * nbytes, dtype=torch.uint8)
            at = -self.mine.data_ptr() % 4096
            self.bytes = self.mine[at : at + nbytes]
            self.bases = tuple(
                self.bytes.data_ptr() if r == group.rank else b for r, b in enumerate(self.bases)
            )


def test_a_way_that_fails_on_one_rank_is_passed_over_on_all(group: Communicator) -> None:
    memory = PeerMemory.open(group, 5, HOST, ways=(Broken, HostMapping))
    assert memory.access.way == HostMapping.way and memory.bytes.numel() == 2 << 20
    assert "broken: passed over" in memory.access.explain() and "division" in memory.access.explain()
    assert len(set(group.all_gather_object(memory.access))) == 1
    memory.close()
    memory.close()
    with pytest.raises(AgreedError, match=r"peer memory: broken: .*division"):
        PeerMemory.open(group, 5, HOST, ways=(Broken,))


@pytest.mark.mpi(min_size=2, deadline=120)
def test_memory_that_peers_do_not_see_fails_the_trial(group: Communicator) -> None:
    limits = Deadlines(connect=0.5)
    memory = PeerMemory.open(
        group, 1 << 20, HOST, ways=(Apart, HostMapping), trial=lambda m: try_exchange(m, limits)
    )
    assert memory.access.way == HostMapping.way
    assert "has not sent its rows of tokens 0.5 s after" in memory.access.explain()
    memory.close()


def test_access_is_found_by_a_trial(group: Communicator) -> None:
    access = find_access(group, HOST, Deadlines(connect=30))
    assert access.way == HostMapping.way and access.refusal is None
    assert access.explain() == f"{HostMapping.way}: chosen"


@pytest.mark.mpi(min_size=2, deadline=120)
@pytest.mark.parametrize("way", ["dispatch", "home", "weighted"])
@pytest.mark.parametrize("differs", ["layer", "sizes"])
def test_debug_mode_names_the_rank_that_differs(group: Communicator, way: str, differs: str) -> None:
    """Every rank finds it beside the flag of that rank, without waiting for the deadline."""
    window = PeerWindow(group, HOST, Deadlines(connect=30, finish=30))
    exchange = window.exchange(step_of((1,) * group.size))
    peers = exchange.peers
    checking = Exchange(replace(peers, checks=True), exchange.step)
    ids, weights, owner, local = everywhere(checking)
    rows, last = value_of(1, group.rank, 1, 24), group.size - 1
    right, wrong = label_of(3, 24, 1), label_of(4, 24, 1) if differs == "layer" else label_of(3, 25, 1)
    mine = wrong if group.rank == last else right
    checking.dispatch(rows, ids, weights, owner, local, label=mine if way == "dispatch" else right)
    if way == "home":
        checking.rows_home(checking.rows(torch.float32), mine)
    elif way == "weighted":
        slots = checking.rows(torch.float32).repeat_interleave(group.size, 0)
        checking.weighted_home(slots, mine)
    text = str(window.problem())
    other, layer = (last, 3) if group.rank != last else (0, layer_of(mine))
    where = {"layer": f"it is in layer {7 - layer}", "sizes": "it has another step or size"}[differs]
    if differs == "layer":
        layer = layer_of(mine)
    assert f"exchange 1 of layer {layer}: rank {other} differs from rank {group.rank}: {where}" in text
    group.barrier()
    window.close()


def test_debug_mode_lets_pass_what_fits(group: Communicator) -> None:
    window = PeerWindow(group, HOST, Deadlines(connect=30, finish=30))
    exchange = window.exchange(step_of((2,) * group.size))
    checking = Exchange(replace(exchange.peers, checks=True), exchange.step)
    ids, weights, owner, local = everywhere(checking)
    for number in range(4):
        rows, label = value_of(number, group.rank, 2, 24), label_of(number, number % 2)
        checking.dispatch(rows, ids, weights, owner, local, label=label)
        checking.rows_home(checking.rows(torch.float32), label)
        assert torch.equal(checking.sum_ranks(ids, owner), group.size * rows)
    assert window.problem() is None
    group.barrier()
    window.close()


def test_labels() -> None:
    assert [layer_of(label_of(n)) for n in (-1, 0, 5, 93)] == [-1, 0, 5, 93]
    assert label_of(5, 1, 2) != label_of(5, 1, 3) and layer_of(label_of(5, 1, 2)) == 5
    assert 0 <= label_of(10**6, 7) < 2**31
