"""The inline assembly of the kernels of codes, instruction by instruction, against what it stands for."""

import random
import struct
from pathlib import Path

import pytest
import torch
from ptx_emulator import assembly, bfloat, run, signed

FOLDER = Path(__file__).parents[2] / "kernels" / "gpu"
E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
E2M1 += [-x for x in E2M1]


@pytest.fixture
def draw(fresh_seed):
    random.seed(fresh_seed)
    return lambda: random.getrandbits(32)


def nibble(word: int, place: int) -> int:
    return word >> (4 * place) & 15


def both(x: float) -> int:
    """Return the bits of a bfloat16 number, twice in a word."""
    bits = int(torch.tensor(x).to(torch.bfloat16).view(torch.int16)) & 0xFFFF
    return bits | bits << 16


@pytest.mark.parametrize("code", ["int4", "e2m1"])
def test_dot_of_words(code, draw):
    int4, e2m1 = assembly(FOLDER / "nibble_sums.py", "dot_words")
    for _ in range(200):
        word, *pairs = (draw() for _ in range(5))
        found = run(int4 if code == "int4" else e2m1, 2, [word, *pairs])
        value = (lambda n: n) if code == "int4" else (lambda n: 12 + int(2 * E2M1[n]))
        numbers = [signed(half, 16) for pair in pairs for half in (pair & 0xFFFF, pair >> 16)]
        for plane, sum_found in enumerate(found):
            expected = sum(
                value(nibble(word, 2 * byte + plane)) * numbers[4 * plane + byte] for byte in range(4)
            )
            assert signed(sum_found, 32) == expected


def test_e4m3_becomes_float32(draw):
    (text,) = assembly(FOLDER / "grouped_mm_codes_vector.py", "numbers")
    for _ in range(200):
        word = draw()
        codes = torch.tensor([word >> (8 * n) & 0xFF for n in range(4)], dtype=torch.uint8)
        expected = codes.view(torch.float8_e4m3fn).float().tolist()
        for bits, value in zip(run(text, 4, [word]), expected, strict=True):
            got = struct.unpack("<f", struct.pack("<I", bits))[0] * 256.0
            assert got == value or value != value  # noqa: PLR0124 - NaN


def test_e4m3_becomes_bfloat16(draw):
    (text,) = assembly(FOLDER / "grouped_mm_codes_decoded.py", "numbers_e4m3")
    for _ in range(200):
        word = draw()
        codes = torch.tensor([word >> (8 * n) & 0xFF for n in range(4)], dtype=torch.uint8)
        expected = codes.view(torch.float8_e4m3fn).float().tolist()
        for got, value in zip(planes(run(text, 2, [word])), expected, strict=True):
            assert got == value or value != value  # noqa: PLR0124 - NaN


def planes(found: list[int]) -> list[float]:
    """Return the numbers of the low plane's bytes 0 to 3, then those of the high one."""
    return [bfloat(word >> shift) for word in found for shift in (0, 16)]


def test_e2m1_becomes_bfloat16(draw):
    (text,) = assembly(FOLDER / "decoded_nibbles.py", "numbers_e2m1")
    for _ in range(200):
        word, (a, b, c, d) = draw(), (2.0 ** random.randint(60, 120) for _ in range(4))
        got = planes(run(text, 4, [word, both(a), both(b), both(c), both(d)]))
        scales = [a, a, b, b, c, c, d, d]
        places = [0, 2, 4, 6, 1, 3, 5, 7]
        assert got == [E2M1[nibble(word, p)] * 2.0**-126 * s for p, s in zip(places, scales, strict=True)]


@pytest.mark.parametrize("function", ["numbers_int4", "integers_int4"])
def test_int4_becomes_bfloat16(function, draw):
    (text,) = assembly(FOLDER / "decoded_nibbles.py", function)
    places = [0, 2, 4, 6, 1, 3, 5, 7]
    for _ in range(200):
        word, zeros = draw(), [random.randint(0, 15) for _ in range(4)]
        scales = [random.choice([1.0, 0.5, 0.375, 3.0]) for _ in range(4)]
        offsets = [both(128.0 + zero) for zero in zeros]
        has_scales = function == "numbers_int4"
        got = planes(run(text, 4, [word, *(map(both, scales) if has_scales else ()), *offsets]))
        expected = [
            (nibble(word, p) - zeros[n // 2]) * (scales[n // 2] if has_scales else 1.0)
            for n, p in enumerate(places)
        ]
        assert got == expected
