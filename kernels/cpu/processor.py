"""What the host's processor can do."""

import torch


def multiplies_bfloat16() -> bool:
    """Whether it has arithmetic in bfloat16 (x86's avx512_bf16), with which products of many rows run fastest.

    Without it oneDNN takes such products apart, at a fifth of float32's speed, and rounds a row by how many others there
    are.
    """
    return bool(torch.cpu._is_avx512_bf16_supported())
