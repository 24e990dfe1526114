"""The lines of a text file, as bytes and as text: UTF-8, with or without byte order marks."""

import codecs
from pathlib import Path

MARKS = (
    (codecs.BOM_UTF32_LE, "UTF-32"),  # before UTF-16, whose mark is the beginning of this one
    (codecs.BOM_UTF32_BE, "UTF-32"),
    (codecs.BOM_UTF16_LE, "UTF-16"),
    (codecs.BOM_UTF16_BE, "UTF-16"),
)
ARCHIVES = (
    (b"\x1f\x8b", "gzip"),
    (b"\x28\xb5\x2f\xfd", "zstd"),
    (b"\xfd7zXZ", "xz"),
    (b"BZh", "bzip2"),
    (b"PK\x03\x04", "zip"),
)
HEAD = 4096
"""Bytes of a file that show which encoding it has."""
LEAST_READABLE = 4
"""One line of so many must be text, or a file without a mark is taken to have another encoding as a whole."""


def read_lines(path: Path) -> list[tuple[int, bytes]]:
    """Return number and bytes of every line of ``path`` that is not blank, without its end and mark.

    Lines end in a newline and nothing else: a text may hold any other separator that Unicode knows. A mark
    may begin any line, as files that have one are often appended to others. Raises OSError, and ValueError
    for a file that as a whole is UTF-16, UTF-32 or compressed; a single line in the wrong encoding is left to
    :func:`decode`.
    """
    lines: list[tuple[int, bytes]] = []
    with open(path, "rb") as file:
        head = file.read(HEAD)
        file.seek(0)
        for number, raw in enumerate(file, start=1):
            line = raw.rstrip(b"\r\n")
            while line.startswith(codecs.BOM_UTF8):
                line = line.removeprefix(codecs.BOM_UTF8)
            if line.strip():
                lines.append((number, line))
    readable = sum(_is_text(line) for _, line in lines)
    if other := _by_mark(path, head, readable) or _by_bytes(head, readable, len(lines)):
        raise ValueError(f"{path}: {other}")
    return lines


def decode(line: bytes) -> str:
    """Return the text of ``line``; raise ValueError where it is not UTF-8 or holds a NUL byte."""
    if (place := line.find(b"\0")) >= 0:
        raise ValueError(f"byte {place} is NUL, which no text holds; remove it, or save the file as UTF-8")
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"byte {error.start} is not UTF-8; save the file as UTF-8") from None


def _by_mark(path: Path, head: bytes, readable: int) -> str | None:
    """Say that a file is UTF-16 or UTF-32 if it begins like one and is one to its end.

    In a file of UTF-8 whose first line alone is UTF-16, newlines of UTF-16 are fewer than ``readable`` lines.
    """
    name = next((name for mark, name in MARKS if head.startswith(mark)), None)
    if name is None:
        return None
    try:
        newlines = path.read_bytes().decode(name).count("\n")
    except UnicodeDecodeError:
        newlines = 0
    return _remedy(name) if newlines >= readable else None


def _by_bytes(head: bytes, readable: int, lines: int) -> str | None:
    """Describe the form and the remedy of a file of which hardly a line can be read as UTF-8."""
    if LEAST_READABLE * readable >= lines:
        return None
    archive = next((name for mark, name in ARCHIVES if head.startswith(mark)), None)
    if archive is not None:
        return f"is compressed ({archive}), and must be text in UTF-8; unpack it"
    name = _by_nul_bytes(head)
    return None if name is None else _remedy(name)


def _remedy(name: str) -> str:
    return f"is {name}, and must be UTF-8; convert it (iconv -f {name} -t UTF-8 OLD > NEW)"


def _by_nul_bytes(head: bytes) -> str | None:
    """Name the encoding without a mark by the places of NUL bytes, one or three of four in most texts."""
    nul = [_share(head[place::4]) for place in range(4)]
    if min(nul[2], nul[3]) > 0.9 and nul[0] < 0.1:
        return "UTF-32LE"
    if min(nul[0], nul[1]) > 0.9 and nul[3] < 0.1:
        return "UTF-32BE"
    if min(nul[1], nul[3]) > 0.3 and max(nul[0], nul[2]) < 0.1:
        return "UTF-16LE"
    if min(nul[0], nul[2]) > 0.3 and max(nul[1], nul[3]) < 0.1:
        return "UTF-16BE"
    return None


def _share(part: bytes) -> float:
    return part.count(0) / max(1, len(part))


def _is_text(line: bytes) -> bool:
    try:
        decode(line)
    except ValueError:
        return False
    return True
