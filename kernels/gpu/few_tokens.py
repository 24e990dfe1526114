"""The choices on the host for batches of few tokens, without Triton."""

from dataclasses import replace

from xpar.kernels.gpu.tile_tables import Vector

_LEAST_DEPTH = 512  # addends of a step; shorter steps load too few bytes at a time
_MOST_IDLE = 1.25  # lanes of all steps over addends; up to this a deeper step is worth idle lanes


def repeated_bytes(tokens: int, top_k: int, experts: int, routed: int, expert_bytes: int) -> float:
    """Return the bytes that are read again if each slot reads its expert's weights, with random routing.

    Args:
        tokens: M.
        top_k: k.
        experts: E, experts of this rank.
        routed: experts of all ranks, among which tokens choose.
        expert_bytes: bytes of an expert's weights.
    """
    share = min(1.0, top_k / routed)
    slots, different = tokens * share, 1.0 - (1.0 - share) ** tokens  # of one expert
    return experts * (slots - different) * expert_bytes


def fit_depth(vector: Vector, width: int) -> Vector:
    """Return ``vector`` with steps that leave few lanes idle in a sum of ``width`` addends, as wide in all.

    A width of 2880 takes two steps of 2048, whose lanes work on 4096 addends, but three of 1024.
    """

    def idle(depth: int) -> float:
        return -(-width // depth) * depth / width

    if idle(vector.depth) <= _MOST_IDLE:
        return vector
    halvings = [n for n in range(vector.depth.bit_length()) if n == 0 or vector.depth >> n >= _LEAST_DEPTH]
    n = min(halvings, key=lambda n: (idle(vector.depth >> n), n))
    return replace(vector, depth=vector.depth >> n, columns=vector.columns << n)
