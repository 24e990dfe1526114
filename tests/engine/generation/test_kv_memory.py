"""A pool is what the work can need, within the memory that is given or free."""

from types import SimpleNamespace

import pytest
import torch
from loaded_models import loaded
from shrunk_families import small_model

from xpar.engine.commands.options import read_bytes
from xpar.engine.generation import kv_memory
from xpar.engine.generation.kv_memory import (
    GPU_READ_TOKENS,
    GPU_SHARE,
    READ_TOKENS,
    STEP_SHARE,
    BatchRoom,
    choose_blocks,
    choose_read_tokens,
    choose_rows,
    free_share,
    gpu_step_bytes,
    most_read,
)
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


class OtherRanks:
    """A communicator whose other ranks give ``others``."""

    def __init__(self, *others: int) -> None:
        self._others = others

    def all_gather_object(self, own: int | None) -> list[int | None]:
        return [own, *(self._others if own is not None else [None for _ in self._others])]


def test_a_step_on_a_gpu_reads_what_memory_allows_on_every_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = SimpleNamespace(device=torch.device("cuda:0"))
    monkeypatch.setattr(kv_memory, "flat_forms", lambda loaded: FORMS)
    monkeypatch.setattr(kv_memory, "gpu_step_bytes", lambda loaded, tokens: 1000 * tokens)

    def chosen(free: int, *others: int) -> int:
        monkeypatch.setattr(kv_memory, "free_share", lambda loaded: GPU_SHARE * free)
        return choose_read_tokens(OtherRanks(*others), gpu)

    enough = int(1000 * GPU_READ_TOKENS / STEP_SHARE) + 1
    assert chosen(enough) == chosen(100 * enough) == GPU_READ_TOKENS
    assert chosen(enough - 2) == chosen(enough // 2 + 1) == GPU_READ_TOKENS // 2
    assert chosen(0) == READ_TOKENS
    assert chosen(enough, GPU_READ_TOKENS, READ_TOKENS) == READ_TOKENS
    monkeypatch.setattr(kv_memory, "flat_forms", lambda loaded: "it keeps states")
    assert chosen(enough) == READ_TOKENS
    host = SimpleNamespace(device=torch.device("cpu"))
    assert choose_read_tokens(OtherRanks(), host) == READ_TOKENS


def test_a_step_takes_what_its_experts_and_dense_layers_write() -> None:
    """Per token: rows of slots on this rank and of the exchange, outputs of the widest dense product."""
    holder = loaded(small_model("olmoe", "OlmoeForCausalLM", seed=3))
    hidden, width, ranks, top_k = 48, 20, 3, 2
    runner = SimpleNamespace(
        experts=SimpleNamespace(
            kernel=SimpleNamespace(spec=SimpleNamespace(intermediate_size=width)),
            experts=range(4),
            dtype=torch.bfloat16,
            hidden_size=hidden,
        ),
        config=SimpleNamespace(router=SimpleNamespace(top_k=top_k), num_experts=12, hidden_size=hidden),
        grid=SimpleNamespace(moe=SimpleNamespace(size=ranks)),
    )
    holder.layers, holder.dtype = (SimpleNamespace(runner=runner),), torch.bfloat16
    config = holder.model.config
    widest = max(config.hidden_size, config.num_attention_heads * getattr(config, "head_dim", 0))
    assert widest < config.vocab_size  # that of the head, whose logits are few
    slots = ranks * top_k * 4 / 12
    a_token = slots * (2 * hidden + 3 * width) + 2 * ranks * hidden + 4 * widest
    assert gpu_step_bytes(holder, 100) == 100 * 2 * a_token


def test_a_step_reads_whole_prompts_or_a_piece_of_a_longer_one() -> None:
    assert most_read([1500] * 24, 16384) == 15000
    assert most_read([1500] * 24, 512) == 512
    assert most_read([900, 700, 90, 20, 7], 1000) == 997
    assert most_read([30, 20], 4096) == 50 and most_read([], 4096) == 0


def test_as_many_sequences_run_as_a_pool_holds() -> None:
    lengths = [BLOCK_TOKENS, 3 * BLOCK_TOKENS - 1, 2 * BLOCK_TOKENS]
    assert choose_rows(512, 2000, lengths) == 512
    assert choose_rows(512, 600, lengths) == 300
    assert choose_rows(512, 1, lengths) == 1
    assert choose_rows(512, 1, []) == 512


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
