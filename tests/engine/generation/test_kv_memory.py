"""A pool is what the work can need, within the memory that is given or free."""

from types import SimpleNamespace

import pytest
import torch

from xpar.engine.commands.options import read_bytes
from xpar.engine.generation import kv_memory
from xpar.engine.generation.kv_memory import BatchRoom, choose_blocks, free_share
from xpar.engine.models.kv_pool import BLOCK_TOKENS, KvPool, LayerForm

FORMS = (LayerForm(4, 16, 16, torch.bfloat16), LayerForm(2, 24, 8, torch.bfloat16, window=7))
BLOCK = BLOCK_TOKENS * 2 * (4 * 32 + 2 * 32)


def test_a_pool_has_the_bytes_that_its_blocks_say() -> None:
    pool = KvPool(FORMS, 5)
    tensors = [*pool.keys, *pool.values]
    assert pool.nbytes == 5 * BLOCK == sum(tensor.nbytes for tensor in tensors)


def test_a_small_job_takes_no_more_than_it_can_need() -> None:
    lengths = [BLOCK_TOKENS + 1, 1, 3 * BLOCK_TOKENS]
    assert choose_blocks(FORMS, BatchRoom(256, lengths=lengths), 2**40) == 2 + 1 + 3 + 256 // 4 + 1
    # Of many prompts, those that run at a time, and as much again for beginnings that are kept.
    assert choose_blocks(FORMS, BatchRoom(2, lengths=[BLOCK_TOKENS] * 1000), 2**40) == 2 * 2 + 1


def test_the_given_or_the_free_memory_bounds_a_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = [BLOCK_TOKENS] * 10**6
    assert choose_blocks(FORMS, BatchRoom(10**6, kv_bytes=7 * BLOCK + 1, lengths=lengths), BLOCK) == 7
    monkeypatch.setattr(kv_memory, "available_bytes", lambda: 80.0 * BLOCK)
    host = SimpleNamespace(device=torch.device("cpu"), ranks_of_node=4)
    assert choose_blocks(FORMS, BatchRoom(10**6, lengths=lengths), free_share(host)) == 10
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (90 * BLOCK, 200 * BLOCK))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 30 * BLOCK)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 20 * BLOCK)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    gpu = SimpleNamespace(device=torch.device("cuda:1"), ranks_of_node=3)  # two of them on one GPU
    assert choose_blocks(FORMS, BatchRoom(10**6, lengths=lengths), free_share(gpu)) == 35
    with pytest.raises(ValueError, match=f"--kv-memory: {BLOCK - 1} bytes, and the keys and values"):
        choose_blocks(FORMS, BatchRoom(kv_bytes=BLOCK - 1), 2**40)


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [("4GiB", 4 * 2**30), ("500MB", 500 * 10**6), ("1.5G", 15 * 10**8), ("2kib", 2048), ("77", 77)],
)
def test_bytes_are_read_with_their_unit(text: str, nbytes: int) -> None:
    assert read_bytes(text, "--kv-memory") == nbytes


@pytest.mark.parametrize("text", ["", "0", "0GB", "-1GB", "4 apples", "GiB"])
def test_words_that_are_no_bytes_are_one_error(text: str) -> None:
    with pytest.raises(ValueError, match=f"--kv-memory {text}: must be a number above zero with a unit"):
        read_bytes(text, "--kv-memory")
