"""The files of answers and of errors on rank 0; nothing written is lost, whatever ends the job.

Answers, and the failures of prompts that the model could not answer, are appended as they come, each batch
forced to the disk. A line is an answer only once its newline is there. When the last one has come each file
is replaced, in one step, by one in the order of the prompts.
"""

import json
import os
from collections.abc import Collection, Iterable, Mapping
from io import FileIO
from pathlib import Path
from typing import Any

from xpar.engine.generation.prompts import BadLine
from xpar.engine.generation.settings import differences

Record = Mapping[str, Any]


def errors_path(out: Path) -> Path:
    """Return the path of the errors of ``out``: ``answers.jsonl`` -> ``answers.errors.jsonl``."""
    return out.with_name(f"{out.name.removesuffix('.jsonl')}.errors.jsonl")


def is_failure(record: Record) -> bool:
    """Return whether ``record`` says why a prompt has no answer."""
    return "error" in record


def write_errors(out: Path, bad: Iterable[BadLine], failures: Iterable[Record] = ()) -> None:
    """Write the lines that are no prompts, and ``failures``, beside ``out``; without any no file stays."""
    records = sorted([*(entry.record() for entry in bad), *failures], key=lambda record: record["line"])
    if records:
        _replace(errors_path(out), map(_line, records))
    else:
        errors_path(out).unlink(missing_ok=True)


def read_answers(out: Path, hashes: Collection[str], settings: str) -> dict[str, Record]:
    """Read the answers in ``out`` to prompts of ``hashes``, by hash; {} without a file.

    A line that a killed job left unfinished, and answers to prompts that are no more, are left out. Raises
    ValueError for an answer that was given with other ``settings``, or for a file that holds something else.
    """
    answers: dict[str, Record] = {}
    if not out.exists():
        return answers
    for line, raw in enumerate(out.read_bytes().split(b"\n")[:-1], start=1):
        record = _record(raw)
        if record is None:
            raise ValueError(f"{out}: line {line} is no answer of xpar generate or score; give another --out")
        _check_settings(out, line, record, settings)
        if record["hash"] in hashes:
            answers[record["hash"]] = record
    return answers


def read_failures(out: Path, hashes: Collection[str], settings: str) -> dict[str, Record]:
    """Read the failures beside ``out`` of prompts of ``hashes``, by hash; {} where ``out`` is not there.

    Lines that are no prompts are left out, as they are read anew. ValueError for one of other ``settings``.
    """
    failures: dict[str, Record] = {}
    path = errors_path(out)
    if not out.exists() or not path.exists():
        return failures
    for line, raw in enumerate(path.read_bytes().split(b"\n")[:-1], start=1):
        record = _record(raw)
        if record is not None and is_failure(record) and isinstance(record.get("line"), int):
            _check_settings(path, line, record, settings)
            if record["hash"] in hashes:
                failures[record["hash"]] = record
    return failures


def _check_settings(path: Path, line: int, record: Record, settings: str) -> None:
    if record["settings"] == settings:
        return
    what = ", ".join(differences(str(record["settings"]), settings)) or "of an earlier version of xpar"
    raise ValueError(
        f"{path}: line {line} was answered with another model or other options; different: {what}. Resume "
        "with those of that "
        "run, or give another --out"
    )


def _record(raw: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(raw)
    except (ValueError, RecursionError):
        return None
    known = isinstance(record, dict) and isinstance(record.get("hash"), str) and "settings" in record
    return record if known else None


def open_answer_file(out: Path, answers: Iterable[Record]) -> None:
    """Replace the file ``out`` by one of ``answers`` alone."""
    _replace(out, [_line(record) for record in answers])


class AnswerFile:
    """The answers in ``out``, made by :func:`open_answer_file`; ``failed`` are in a file beside it."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.failed = 0
        self._answers = _Appender(out)
        self._errors: _Appender | None = None

    def append(self, records: Collection[Record]) -> None:
        """Write ``records`` and wait for the disk; OSError where it is full, and what was there stays."""
        failures = [record for record in records if is_failure(record)]
        if failures:
            self._errors = self._errors or _Appender(errors_path(self.out))
            self._errors.append(failures)
            self.failed += len(failures)
        self._answers.append(record for record in records if not is_failure(record))

    def close(self) -> None:
        self._answers.close()
        if self._errors is not None:
            self._errors.close()

    def finish(self, order: Mapping[str, int]) -> None:
        """Close the files and sort their lines by ``order`` (hash -> place), errors by their lines."""
        self.close()
        lines = self.out.read_bytes().splitlines(keepends=True)
        _replace(self.out, sorted(lines, key=lambda line: order[json.loads(line)["hash"]]))
        if self.failed:
            path = errors_path(self.out)
            errors = path.read_bytes().splitlines(keepends=True)
            _replace(path, sorted(errors, key=lambda line: json.loads(line)["line"]))


class _Appender:
    """A file that grows by whole records, which are on the disk when :meth:`append` returns."""

    def __init__(self, path: Path) -> None:
        self.path = path
        # Open as long as the job answers; without a buffer, which would be written once more when the process
        # ends.
        self._file: FileIO = open(path, "ab", buffering=0)  # noqa: SIM115

    def append(self, records: Iterable[Record]) -> None:
        try:
            text = memoryview(b"".join(_line(record) for record in records))
            while text:
                text = text[self._file.write(text) :]
            os.fsync(self._file.fileno())
        except OSError as error:
            raise OSError(
                f"{self.path}: cannot be written ({error.strerror}); the answers before are kept: make room, "
                "then run again "
                "with --resume"
            ) from None

    def close(self) -> None:
        self._file.close()


def _line(record: Record) -> bytes:
    try:
        return (json.dumps(record, ensure_ascii=False) + "\n").encode()
    except UnicodeEncodeError:  # half of a surrogate pair, which JSON can say and UTF-8 cannot
        return (json.dumps(record) + "\n").encode()


def _replace(path: Path, lines: Iterable[bytes]) -> None:
    """Replace the file ``path`` in one step: a reader, or a killed job, sees the old or the new one."""
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
