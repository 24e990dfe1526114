"""Every collective against numpy, in every dtype; mistakes become one error on all ranks."""

from typing import TYPE_CHECKING

import pytest
import torch

from xpar.comm import AgreedError, DesyncError, RemoteRankError, World, agreed
from xpar.comm.communicator import Communicator, Tag
from xpar.comm.handshake import handshake

if TYPE_CHECKING:
    from mpi4py.MPI import Intracomm

pytestmark = pytest.mark.mpi
MOVED = [torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.uint8, torch.int64]
SUMMED = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int32]


@pytest.fixture(scope="module")
def group(comm: "Intracomm") -> Communicator:
    return World.attach(comm).comm


def rows_of(rank: int, seed: int, rows: int, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed * 1000 + rank)
    return (torch.randn(rows, 5, generator=generator) * 20).to(dtype)


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


@pytest.mark.parametrize("dtype", MOVED, ids=str)
def test_all_gather_v_of_uneven_rows(group: Communicator, fresh_seed: int, dtype: torch.dtype) -> None:
    everyone = [rows_of(r, fresh_seed, 2 * r, dtype) for r in range(group.size)]
    assert same(group.all_gather_v(everyone[group.rank]), torch.cat(everyone))
    strided = torch.cat([everyone[group.rank]] * 2, dim=1)[:, :5]
    counts = [2 * r for r in range(group.size)]
    assert same(group.all_gather_v(strided, counts), torch.cat(everyone))


@pytest.mark.parametrize("dtype", MOVED, ids=str)
def test_all_to_all_v_with_empty_pairs(group: Communicator, fresh_seed: int, dtype: torch.dtype) -> None:
    def count(source: int, target: int) -> int:
        return (source * 3 + target * 2) % 4

    def sent(r: int) -> torch.Tensor:
        return rows_of(r, fresh_seed, sum(count(r, t) for t in range(group.size)), dtype)

    def block(s: int) -> torch.Tensor:
        first = sum(count(s, t) for t in range(group.rank))
        return sent(s)[first : first + count(s, group.rank)]

    send = [count(group.rank, t) for t in range(group.size)]
    recv = [count(s, group.rank) for s in range(group.size)]
    got = group.all_to_all_v(sent(group.rank), send, recv).wait()
    assert same(got, torch.cat([block(s) for s in range(group.size)]))


@pytest.mark.parametrize("rows", [0, 1, 7, 3001], ids="rows{}".format)
@pytest.mark.parametrize("dtype", SUMMED, ids=str)
def test_sums_accumulate_in_rank_order(
    group: Communicator, fresh_seed: int, dtype: torch.dtype, rows: int
) -> None:
    everyone = [rows_of(r, fresh_seed, rows, dtype) for r in range(group.size)]
    wide = torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype
    total = everyone[0].to(wide)
    for addend in everyone[1:]:
        total = total + addend.to(wide)
    assert torch.equal(group.all_reduce(everyone[group.rank]), total.to(dtype))
    counts = [rows // group.size + (r < rows % group.size) for r in range(group.size)]
    first = sum(counts[: group.rank])
    mine = group.reduce_scatter_v(everyone[group.rank], counts)
    assert torch.equal(mine, total.to(dtype)[first : first + counts[group.rank]])


def test_broadcast_from_the_last_rank(group: Communicator, fresh_seed: int) -> None:
    x = rows_of(group.rank, fresh_seed, 3, torch.bfloat16)
    group.broadcast(x, root=group.size - 1)
    assert same(x, rows_of(group.size - 1, fresh_seed, 3, torch.bfloat16))


def test_split_orders_by_key(group: Communicator) -> None:
    part = group.split(group.rank % 2, -group.rank, "parity")
    expected = [r for r in reversed(range(group.size)) if r % 2 == group.rank % 2]
    assert part.world_ranks == tuple(expected)
    assert int(part.all_reduce(torch.tensor([group.rank]))) == sum(expected)


@pytest.mark.mpi(min_size=2)
def test_other_sizes_are_one_error_everywhere(group: Communicator) -> None:
    with pytest.raises(DesyncError, match=r"rank 0: all_reduce.*row_elements=3") as caught:
        group.all_reduce(torch.ones(3 if group.rank == 0 else 4))
    assert len(set(group.all_gather_object(str(caught.value)))) == 1


@pytest.mark.mpi(min_size=2)
def test_another_layer_or_a_failed_rank_is_one_error_everywhere(group: Communicator) -> None:
    with pytest.raises(DesyncError, match="plan layer 4"):
        handshake(group, Tag("plan", layer=3 + group.rank))
    last = group.size - 1
    with pytest.raises(RemoteRankError, match=f"rank {last}: ValueError: bad token") as caught:
        handshake(group, Tag("plan"), failure=ValueError("bad token") if group.rank == last else None)
    assert len(set(group.all_gather_object(str(caught.value)))) == 1


@pytest.mark.mpi(min_size=2)
def test_one_ranks_mistake_is_agreed(group: Communicator) -> None:
    def attempt() -> int:
        if group.rank == 1:
            raise OSError("no such shard")
        return 7

    with pytest.raises(AgreedError, match="rank 1: no such shard"):
        agreed(group, attempt)
    assert agreed(group, lambda: group.rank) == group.rank


def test_sums_of_fp8_are_refused(group: Communicator) -> None:
    with pytest.raises(ValueError, match="can be moved but not summed"):
        group.all_reduce(torch.zeros(2).to(torch.float8_e4m3fn))
    with pytest.raises(ValueError, match="can be moved but not summed"):
        group.reduce_scatter_v(torch.zeros(group.size, 2).to(torch.float8_e4m3fn), [1] * group.size)
