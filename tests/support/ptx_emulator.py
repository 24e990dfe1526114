"""The few PTX instructions of the kernels' inline assembly, on integers: what the interpreter cannot run."""

import ast
import re
import struct
from pathlib import Path

import torch

MASK = 0xFFFFFFFF


def assembly(path: Path, function: str) -> list[str]:
    """Return the inline assembly of a function of a file, in order."""
    tree = ast.parse(path.read_text())
    found = next(n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef) and n.name == function)
    calls = [n for n in ast.walk(found) if isinstance(n, ast.Call) and "inline_asm" in ast.unparse(n.func)]
    texts = [c.args[0].value for c in calls if isinstance(c.args[0], ast.Constant)]
    return [str(text) for text in texts]


def run(text: str, outputs: int, inputs: list[int]) -> list[int]:
    """Run a text whose operands are ``outputs`` results and then ``inputs``; return the results' bits."""
    values = {f"${outputs + n}": value for n, value in enumerate(inputs)}

    def read(name: str) -> int:
        return values[name] if name in values else int(name, 0) & MASK

    for statement in text.strip("{} ").split(";"):
        words = re.split(r"[\s,]+", statement.strip())
        if not words[0] or words[0] == ".reg":
            continue
        name, to, args = words[0], words[1], words[2:]
        if name == "mov.b32" and to.startswith("{"):
            first, second = to.strip("{}"), args[0].strip("{}")
            values[first], values[second] = read(args[1]) & 0xFFFF, read(args[1]) >> 16
        else:
            values[to] = INSTRUCTIONS[name](*map(read, args)) & MASK
    return [values[f"${n}"] for n in range(outputs)]


def permute(a: int, b: int, selector: int) -> int:
    data, result = (a | b << 32).to_bytes(8, "little"), 0
    for n in range(4):
        choice = selector >> (4 * n) & 15
        byte = data[choice & 7]
        result |= ((0xFF if byte & 0x80 else 0) if choice & 8 else byte) << (8 * n)
    return result


def signed(x: int, bits: int) -> int:
    return x - (1 << bits) if x >> (bits - 1) else x


def dot(a: int, b: int, c: int, first: int) -> int:
    pairs = zip((a & 0xFFFF, a >> 16), (b >> (8 * first), b >> (8 * first + 8)), strict=True)
    return c + sum(signed(x, 16) * (y & 0xFF) for x, y in pairs)


def bfloat(bits: int) -> float:
    return float(struct.unpack("<f", struct.pack("<I", (bits & 0xFFFF) << 16))[0])


def fused(a: int, b: int, c: int) -> int:
    result = 0
    for shift in (0, 16):
        exact = bfloat(a >> shift) * bfloat(b >> shift) + bfloat(c >> shift)
        value = torch.tensor(exact, dtype=torch.float64).to(torch.bfloat16)
        result |= (int(value.view(torch.int16)) & 0xFFFF) << shift
    return result


def bits_of_float(half: int) -> int:
    value = struct.unpack("<e", struct.pack("<H", half & 0xFFFF))[0]
    return int(struct.unpack("<I", struct.pack("<f", value))[0])


def lop3(a: int, b: int, c: int, table: int) -> int:
    assert table == 0xEA, "only (a & b) | c"
    return a & b | c


INSTRUCTIONS = {
    "mov.b32": lambda a: a,
    "and.b32": lambda a, b: a & b,
    "or.b32": lambda a, b: a | b,
    "xor.b32": lambda a, b: a ^ b,
    "shl.b32": lambda a, b: a << b,
    "shr.u32": lambda a, b: a >> b,
    "lop3.b32": lop3,
    "prmt.b32": permute,
    "dp2a.lo.s32.u32": lambda a, b, c: dot(a, b, c, 0),
    "dp2a.hi.s32.u32": lambda a, b, c: dot(a, b, c, 2),
    "fma.rn.bf16x2": fused,
    "cvt.f32.f16": bits_of_float,
}
