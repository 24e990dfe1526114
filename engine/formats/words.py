"""Integer codes in words of 32 bits, which files keep in three orders.

A word is four bytes, and a byte two nibbles, the low one first. This is the order of canonical codes, so that
words along K need no shuffling.
"""

import torch
from torch import Tensor

AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)
"""The place of each of eight neighbouring codes among the nibbles of an AWQ word."""


def bytes_along_rows(words: Tensor) -> Tensor:
    """Return the bytes [n, 4 w] of words [n, w] int32 that are packed along their rows."""
    return words.view(torch.uint8)


def bytes_along_columns(words: Tensor) -> Tensor:
    """Return the bytes [n, 4 w] of words [w, n] int32 that are packed along their columns."""
    # Not contiguous(), which leaves a row of one word the strides that it has.
    return words.T.clone(memory_format=torch.contiguous_format).view(torch.uint8)


def codes_of_bytes(packed: Tensor, bits: int) -> Tensor:
    """Return one code a byte, [n, 2 m] of bytes [n, m] for 4 bits; 8 bits stay as they are."""
    return packed if bits == 8 else torch.stack([packed & 15, packed >> 4], -1).flatten(-2)


def pack_nibbles(codes: Tensor) -> Tensor:
    """Return the bytes [n, m] of codes [n, 2 m], the low nibble first."""
    return codes[:, 0::2] | (codes[:, 1::2] << 4)


def awq_codes(words: Tensor) -> Tensor:
    """Return the codes [n, 8 w], one a byte, of AWQ words [n, w], in the order of the outputs."""
    nibbles = codes_of_bytes(bytes_along_rows(words), 4)
    return nibbles.view(nibbles.shape[0], -1, 8)[..., list(AWQ_ORDER)].flatten(-2)


def as_signed(codes: Tensor, bits: int) -> Tensor:
    """Return canonical codes: bytes without their offset of 128; nibbles keep theirs of 8."""
    return codes if bits == 4 else (codes ^ 0x80).view(torch.int8)
