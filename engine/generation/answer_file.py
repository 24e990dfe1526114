"""The file of answers, on the rank that keeps it: nothing written is lost, whatever ends the job.

Answers are appended as they come, each batch forced to the disk. A line is an answer only once its newline is there.
When the last one has come the file is replaced, in one step, by one in the order of the prompts.
"""

import json
import os
from collections.abc import Collection, Iterable, Mapping
from io import FileIO
from pathlib import Path
from typing import Any

from xpar.engine.generation.prompts import BadLine

Record = Mapping[str, Any]


def errors_path(out: Path) -> Path:
    """``answers.jsonl`` -> ``answers.errors.jsonl``."""
    return out.with_name(f"{out.name.removesuffix('.jsonl')}.errors.jsonl")


def write_errors(out: Path, bad: Iterable[BadLine]) -> None:
    """Write the lines that are no prompts beside ``out``; where there are none, no such file stays behind."""
    lines = [_line(entry.record()) for entry in bad]
    if lines:
        _replace(errors_path(out), lines)
    else:
        errors_path(out).unlink(missing_ok=True)


def read_answers(out: Path, hashes: Collection[str], settings: str) -> dict[str, Record]:
    """Prompt's hash -> answer, of those in ``out`` that answer one of ``hashes``; {} without a file.

    A line that a killed job left unfinished, and answers to prompts that are no more, are left out. Raises ValueError
    for an answer that was given with other ``settings``, or for a file that holds something else.
    """
    answers: dict[str, Record] = {}
    if not out.exists():
        return answers
    for line, raw in enumerate(out.read_bytes().split(b"\n")[:-1], start=1):
        record = _record(raw)
        if record is None:
            raise ValueError(f"{out}: line {line} is no answer of xpar generate or score; give another --out")
        if record["settings"] != settings:
            raise ValueError(
                f"{out}: line {line} was answered with another model, sampling, dtype or limit; resume with the options "
                "of that run, or give another --out"
            )
        if record["hash"] in hashes:
            answers[record["hash"]] = record
    return answers


def _record(raw: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(raw)
    except ValueError:
        return None
    return record if isinstance(record, dict) and {"hash", "settings"} <= record.keys() else None


def open_answer_file(out: Path, answers: Iterable[Record]) -> None:
    """Make ``out`` hold ``answers`` and nothing else."""
    _replace(out, [_line(record) for record in answers])


class AnswerFile:
    """Appends to ``out``, a file that :func:`open_answer_file` has left."""

    def __init__(self, out: Path) -> None:
        self.out = out
        # Open as long as the job answers; without a buffer, which would be written once more when the process ends.
        self._file: FileIO = open(out, "ab", buffering=0)  # noqa: SIM115

    def append(self, records: Iterable[Record]) -> None:
        """Write ``records`` and wait until they are on the disk. OSError where it is full; what was kept before stays."""
        try:
            text = memoryview(b"".join(_line(record) for record in records))
            while text:
                text = text[self._file.write(text) :]
            os.fsync(self._file.fileno())
        except OSError as error:
            raise OSError(
                f"{self.out}: cannot be written ({error.strerror}); the answers before are kept: make room, then run again "
                "with --resume"
            ) from None

    def close(self) -> None:
        self._file.close()

    def finish(self, order: Mapping[str, int]) -> None:
        """Close, and put the lines in the order that ``order`` (hash -> place) gives."""
        self.close()
        lines = self.out.read_bytes().splitlines(keepends=True)
        _replace(self.out, sorted(lines, key=lambda line: order[json.loads(line)["hash"]]))


def _line(record: Record) -> bytes:
    return (json.dumps(record, ensure_ascii=False) + "\n").encode()


def _replace(path: Path, lines: Iterable[bytes]) -> None:
    """A reader, and a job killed meanwhile, sees the old file or the new one."""
    part = path.with_name(f"{path.name}.part")
    with open(part, "wb") as file:
        file.writelines(lines)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
