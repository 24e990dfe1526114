"""The memory of a rank's batch: its pool of keys and values, and the tokens of a step that reads."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch

from xpar.comm.communicator import Communicator
from xpar.comm.failure import agreed
from xpar.engine.layer.expert_shard import ExpertShard
from xpar.engine.models.flat_forward import flat_forms
from xpar.engine.models.kv_pool import BLOCK_TOKENS, LayerForm
from xpar.engine.models.lm_head import find_head
from xpar.engine.models.loaded_model import LoadedModel
from xpar.engine.models.malloc import available_bytes, peak_bytes, resident_bytes

BATCH, FLAT_BATCH, GPU_BATCH = 16, 256, 512
"""Sequences that a rank runs at a time by default: in padded batches, and in flat ones on host processors and
on GPUs, bound by memory."""
READ_TOKENS, GPU_READ_TOKENS = 4096, 16384
"""Tokens of prompts that a rank reads in one step by default: at all, and in flat batches on GPUs, if memory
allows. A launched step costs the host 50 ms, and 4,096 tokens the GPU 15 (OLMoE's form, 16 layers, H200)."""
SHARE = 0.5
"""The share of a node's free memory that its ranks take for keys and values at most, if none is given."""
GPU_SHARE = 0.7
"""The same of a GPU, whose memory nobody else uses; the rest is for the numbers of a step, and recordings."""
STEP_SHARE = 0.15
"""The share of a GPU's free memory that a step may take: half of what the pool leaves, beside recordings."""
DENSE_PARTS = 4
"""Outputs as wide as a dense product's widest that live at a time: query, key, value and attention."""
FIRST_STEP_BYTES = 40 * 10**6
"""Bytes that the libraries take for themselves in the first step of a process (torch 2.13, two models)."""
UNKNOWN_BYTES = 2**30
"""The bytes of a pool for work of unknown size."""
KEPT = 2
"""The blocks of a pool over those that running sequences can need: room to keep the beginnings of others."""


def step_bytes(loaded: LoadedModel, tokens: int) -> int:
    """Estimate the bytes of a host processor's step of ``tokens`` tokens a rank beside weights and pool.

    That is what the widest layer's experts read, keep and write: for each slot rows of H, of gate, up and
    activation, and of H again.
    """
    return FIRST_STEP_BYTES + _expert_bytes(loaded, tokens)


def gpu_step_bytes(loaded: LoadedModel, tokens: int) -> int:
    """Estimate the bytes of a GPU's step of ``tokens`` tokens a rank beside weights, pool and logits.

    To what the experts take come the rows of all ranks as they arrive and leave, and the outputs of the
    widest dense products; logits are made of the last tokens of sequences alone.
    """
    runners = [layer.runner for layer in loaded.layers]
    travelling = max((2 * r.grid.moe.size * r.config.hidden_size for r in runners), default=0)
    head = find_head(loaded.model)
    widths = (getattr(m, "out_features", 0) for m in loaded.model.modules() if m is not head)
    dense = DENSE_PARTS * int(max(widths, default=0))
    return _expert_bytes(loaded, tokens) + tokens * loaded.dtype.itemsize * (dense + travelling)


def choose_read_tokens(comm: Communicator, loaded: LoadedModel) -> int:
    """Choose the tokens of prompts that a rank reads in one step; the same on every rank.

    Collective. In flat batches on GPUs there are more of them, halved until a step has memory. Raises
    AgreedError if a rank's free memory cannot be found out.
    """
    of_ranks: list[int] = comm.all_gather_object(agreed(comm, lambda: _fitting_tokens(loaded)))
    return min(of_ranks)


def _fitting_tokens(loaded: LoadedModel) -> int:
    tokens = READ_TOKENS
    if loaded.device.type != "cpu" and not isinstance(flat_forms(loaded), str):
        tokens, room = GPU_READ_TOKENS, STEP_SHARE / GPU_SHARE * free_share(loaded)
        while tokens > READ_TOKENS and gpu_step_bytes(loaded, tokens) > room:
            tokens //= 2
    return tokens


def _expert_bytes(loaded: LoadedModel, tokens: int) -> int:
    def of_layer(shard: ExpertShard, top_k: int, experts: int, ranks: int) -> float:
        if shard.kernel is None:
            return 0.0
        width = shard.kernel.spec.intermediate_size
        slots = tokens * ranks * top_k * len(shard.experts) / experts
        return slots * shard.dtype.itemsize * (2 * shard.hidden_size + 3 * width)

    runners = (layer.runner for layer in loaded.layers)
    found = (
        of_layer(r.experts, r.config.router.top_k, r.config.num_experts, r.grid.moe.size) for r in runners
    )
    return int(max(found, default=0.0))


def expected_bytes(more: int) -> int:
    """Return the most memory that this process will have had once it takes ``more`` bytes."""
    return max(peak_bytes(), resident_bytes() + more)


@dataclass(frozen=True)
class BatchRoom:
    """The room of a rank's batch.

    ``most_rows``: sequences that run at a time. ``prefill_tokens``: of prompts read in one step.
    ``kv_bytes``: of keys and values; None to choose. ``lengths``: most tokens of each prompt and its answer,
    where they are known. ``shares_prefixes``: whether prompts that begin alike share keys and values.
    """

    most_rows: int = BATCH
    prefill_tokens: int = READ_TOKENS
    kv_bytes: int | None = None
    lengths: Sequence[int] | None = None
    shares_prefixes: bool = True


def free_share(loaded: LoadedModel) -> int:
    """Return the bytes of a rank's share of the free memory of its node or, where it has one, its GPU."""
    if loaded.device.type == "cpu":
        return int(SHARE * min(available_bytes(), 2.0**60) / loaded.ranks_of_node)
    # What torch has taken and does not use, as of a pool before, is free, too.
    unused = torch.cuda.memory_reserved(loaded.device) - torch.cuda.memory_allocated(loaded.device)
    free = torch.cuda.mem_get_info(loaded.device)[0] + unused
    # Ranks that share a GPU share its memory.
    return int(GPU_SHARE * free / -(-loaded.ranks_of_node // torch.cuda.device_count()))


def choose_blocks(forms: Collection[LayerForm], room: BatchRoom, share: int) -> int:
    """Choose the number of blocks of a pool.

    It is what ``room.kv_bytes``, or else ``share``, the bytes of this rank's :func:`free_share`, has place
    for, but no more than the work can need. Raises ValueError for bytes that are not enough for one block.
    """
    block = BLOCK_TOKENS * sum(form.nbytes for form in forms)
    given = room.kv_bytes
    if given is not None and given < block:
        raise ValueError(
            f"--kv-memory: {given} bytes, and the keys and values of {BLOCK_TOKENS} tokens take {block}; "
            "give more"
        )
    most = given if given is not None else share
    if room.lengths is None:
        most = most if given is not None else min(most, UNKNOWN_BYTES)
        return max(1, most // block)
    sizes = sorted((-(-length // BLOCK_TOKENS) for length in room.lengths), reverse=True)
    needed = min(sum(sizes), KEPT * sum(sizes[: room.most_rows])) + room.most_rows // 4 + 1
    return max(1, min(most // block, needed))


def choose_rows(most: int, blocks: int, lengths: Sequence[int]) -> int:
    """Choose how many sequences of ``lengths`` run at a time: ``most``, or what a pool of ``blocks`` holds.

    A pool holds as many of mean length. More would wait there for each other, and begin one by one.
    """
    sizes = [-(-length // BLOCK_TOKENS) for length in lengths]
    return most if not sizes else max(1, min(most, blocks * len(sizes) // sum(sizes)))


def most_read(lengths: Sequence[int], tokens: int) -> int:
    """Estimate the most tokens of prompts of ``lengths``, longest first, in a step with up to ``tokens``.

    Prompts are dealt as wholes within that number; only a longer one is read in pieces.
    """
    read = min(tokens, max(lengths, default=0))
    whole = 0
    for length in lengths:
        whole += length if whole + length <= tokens else 0
    return max(read, whole)
