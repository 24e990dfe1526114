"""The choice on the host for batches of few tokens, without Triton."""

from xpar.kernels.contracts import ExpertSpec

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


def reads_little_again(spec: ExpertSpec, tokens: int, top_k: int, expert_bytes: int, most: int) -> bool:
    """Return whether reading experts once for each slot costs less than the launches of a sort.

    Args:
        spec: The layer.
        tokens: M.
        top_k: k.
        expert_bytes: Bytes of an expert's weights.
        most: Bytes that may be read again.
    """
    experts = spec.num_experts
    routed = max(experts, spec.routed_experts or experts)
    return tokens == 1 or repeated_bytes(tokens, top_k, experts, routed, expert_bytes) <= most
