"""Blocks of a pool are taken, shared and given back without loss, and known ones are found."""

import random

import pytest

from xpar.engine.models.kv_blocks import ROOT, BlockPool


class Sequences:
    """Random sequences over a pool, with the definition beside it: what each block holds."""

    def __init__(self, pool: BlockPool, draw: random.Random) -> None:
        self.pool, self.draw = pool, draw
        self.running: list[tuple[list[int], list[int]]] = []
        self.content: dict[int, tuple[int, ...]] = {}

    def begin(self) -> None:
        """Begin one with few different tokens, so that many begin alike, if there is room."""
        size = self.pool.tokens
        ids = [self.draw.randrange(2) for _ in range(self.draw.randint(1, 5 * size))]
        found = self.pool.find(ids)
        assert len(found) * size < len(ids)
        for n, block in enumerate(found):
            assert self.content[block] == tuple(ids[: (n + 1) * size]), "a block of other tokens"
        if self.pool.available - self.pool.idle_of(found) < self.pool.blocks_of(len(ids)) - len(found):
            return
        self.pool.share(found)
        blocks = list(found)
        is_known = True
        while len(blocks) < self.pool.blocks_of(len(ids)):
            parent, begin = blocks[-1] if blocks else ROOT, len(blocks) * size
            blocks.append(self.pool.take())
            self.content.pop(blocks[-1], None)
            if is_known and begin + size <= len(ids):
                is_known = self.pool.name(blocks[-1], parent, ids[begin : begin + size])
                if is_known:
                    self.content[blocks[-1]] = tuple(ids[: begin + size])
        self.running.append((ids, blocks))

    def end(self) -> None:
        if self.running:
            _, blocks = self.running.pop(self.draw.randrange(len(self.running)))
            self.pool.release(blocks)

    def check(self) -> None:
        used = {block for _, blocks in self.running for block in blocks}
        assert self.pool.available == self.pool.size - len(used)


@pytest.mark.parametrize("shares", [True, False])
def test_random_sequences(fresh_seed: int, shares: bool) -> None:
    draw = random.Random(fresh_seed)
    sequences = Sequences(BlockPool(12, 4, shares), draw)
    for _ in range(600):
        draw.choice([sequences.begin, sequences.begin, sequences.end])()
        sequences.check()
    while sequences.running:
        sequences.end()
    assert sequences.pool.available == 12
    assert sorted(sequences.pool.take() for _ in range(12)) == list(range(12))
    with pytest.raises(IndexError, match="no block is left"):
        sequences.pool.take()


def test_the_block_unused_for_longest_is_forgotten_first_and_children_before_parents() -> None:
    pool = BlockPool(4, 2)
    for ids in ([1, 1, 2, 2, 9], [3, 3, 9]):
        blocks: list[int] = []
        for begin in range(0, len(ids) - 1, 2):
            block = pool.take()
            assert pool.name(block, blocks[-1] if blocks else ROOT, ids[begin : begin + 2])
            blocks.append(block)
        pool.release(blocks)
    pool.take()  # the one that is free
    pool.take()
    assert len(pool.find([1, 1, 2, 2, 9])) == 1 and len(pool.find([3, 3, 9])) == 1
    pool.take()
    assert len(pool.find([1, 1, 2, 2, 9])) == 0 and len(pool.find([3, 3, 9])) == 1
