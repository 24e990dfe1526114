"""The choice on the host for batches of few tokens, without Triton."""

_FOREIGN = 0.1  # of the time that an expert's weights take: that of programs that end at once (H200)


def repeated_bytes(tokens: int, top_k: int, experts: int, routed: int, expert_bytes: int) -> float:
    """Return the bytes that cost as much as slots by themselves do beside slots that are sorted.

    They are those that are read again if each slot reads its expert's weights, with random routing, and for
    each slot of another rank a tenth of an expert's.

    Args:
        tokens: M.
        top_k: k.
        experts: E, experts of this rank.
        routed: experts of all ranks, among which tokens choose.
        expert_bytes: bytes of an expert's weights.
    """
    share = min(1.0, top_k / routed)
    slots, different = tokens * share, 1.0 - (1.0 - share) ** tokens  # of one expert
    foreign = tokens * top_k * (1.0 - experts / routed)
    return (experts * (slots - different) + _FOREIGN * foreign) * expert_bytes
