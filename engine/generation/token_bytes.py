"""The bytes that each token of a vocabulary adds to a text, by the kind of the tokenizer's decoder."""

import re
from collections.abc import Callable
from typing import Any

BLANK = "▁"
"""The mark of a blank in the vocabularies of sentence pieces."""
FALLBACK = re.compile(r"<0x([0-9A-F]{2})>")


def byte_table() -> dict[str, int]:
    """Return character of a byte-level vocabulary -> byte: printable ones stand for themselves."""
    printable = [
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    ]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(b): b for b in printable} | {chr(256 + n): b for n, b in enumerate(others)}


def make_token_bytes(tokenizer: Any, special_ids: frozenset[int]) -> Callable[[int], bytes]:
    """Make the function from a token's id to the bytes that it adds to a text; its name for a special one."""
    decoder = _decoder(tokenizer)
    table = byte_table() if '"ByteLevel"' in decoder else {}
    has_pieces = BLANK in decoder or '"Metaspace"' in decoder
    has_fallback = '"ByteFallback"' in decoder

    def token_bytes(token: int) -> bytes:
        word = tokenizer.convert_ids_to_tokens(token)
        if word is None:
            return b""  # the model has more rows than the tokenizer has tokens
        if token in special_ids:
            return str(word).encode()
        if table:
            return b"".join(bytes([table[c]]) if c in table else c.encode() for c in word)
        if has_fallback and (byte := FALLBACK.fullmatch(word)):
            return bytes([int(byte[1], 16)])
        if has_pieces:
            return str(word).replace(BLANK, " ").encode()
        return str(tokenizer.decode([token])).encode()

    return token_bytes


def _decoder(tokenizer: Any) -> str:
    """Describe the decoder of a fast tokenizer as JSON; empty for another tokenizer."""
    decoder = getattr(getattr(tokenizer, "backend_tokenizer", None), "decoder", None)
    return "" if decoder is None else decoder.__getstate__().decode()
