"""The files of answers and of errors on rank 0; nothing written is lost, whatever ends the job.

Answers, and the failures of prompts that the model could not answer, are appended as they come, each batch
forced to the disk. A line is an answer only once its newline is there. When the last one has come each file
is replaced, in one step, by one in the order of the prompts.
"""

import json
import os
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any

from xpar.engine.generation.answer_form import AnswerForm, Choice, OwnForm, Result, facts_of
from xpar.engine.generation.prompts import BadLine
from xpar.engine.generation.samples import Samples, samples_path
from xpar.engine.generation.settings import differences
from xpar.engine.generation.work_item import WorkItem


def errors_path(out: Path) -> Path:
    """Return the path of the errors of ``out``: ``answers.jsonl`` -> ``answers.errors.jsonl``."""
    return out.with_name(f"{out.name.removesuffix('.jsonl')}.errors.jsonl")


def is_failure(result: Result) -> bool:
    """Return whether ``result`` says why a prompt has no answer."""
    return "error" in facts_of(result)


@dataclass(frozen=True)
class Done:
    """The hashes of prompts that an earlier run answered or failed on, and hash and number of samples."""

    answered: frozenset[str] = frozenset()
    failed: frozenset[str] = frozenset()
    samples: frozenset[tuple[str, int]] = frozenset()


def settle_files(
    out: Path,
    items: Mapping[str, WorkItem],
    bad: Iterable[BadLine],
    settings: str,
    form: AnswerForm,
    resume: bool,
) -> Done:
    """Read what an earlier run left, then write the files that a run begins with; rank 0 alone.

    ``items``: the work items by hash. ``bad``: lines that are no prompts. ``resume``: whether earlier answers
    are kept. Nothing is written before all is read.
    """
    kept = read_answers(out, items.keys(), settings) if resume else {}
    failures = read_failures(out, items.keys() - kept.keys(), settings) if resume else {}
    left = {item.hash for item in items.values() if item.samples > 1} - kept.keys() - failures.keys()
    samples = Samples()
    for result in read_samples(out, left, settings) if resume else ():
        choices = samples.add(result)
        if choices is not None:  # the job ended between the last sample and the answer
            kept[result["hash"]] = form.answer(items[result["hash"]], choices, settings)
    write_errors(out, bad, failures.values(), form)
    open_answer_file(out, kept.values())
    if samples.results():
        _replace(samples_path(out), map(_line, samples.results()))
    else:
        samples_path(out).unlink(missing_ok=True)
    return Done(frozenset(kept), frozenset(failures), frozenset(samples.done()))


def write_errors(
    out: Path, bad: Iterable[BadLine], failures: Iterable[Result] = (), form: AnswerForm | None = None
) -> None:
    """Write the lines that are no prompts, and ``failures``, beside ``out``; without any no file stays."""
    refused = ((form or OwnForm()).refusal(entry) for entry in bad)
    results = sorted([*refused, *failures], key=lambda result: facts_of(result)["line"])
    if results:
        _replace(errors_path(out), map(_line, results))
    else:
        errors_path(out).unlink(missing_ok=True)


def read_answers(out: Path, hashes: Collection[str], settings: str) -> dict[str, Result]:
    """Read the answers in ``out`` to prompts of ``hashes``, by hash; {} without a file.

    A line that a killed job left unfinished, and answers to prompts that are no more, are left out. Raises
    ValueError for an answer that was given with other ``settings``, or for a file that holds something else.
    """
    answers: dict[str, Result] = {}
    if not out.exists():
        return answers
    for line, raw in enumerate(out.read_bytes().split(b"\n")[:-1], start=1):
        result = _parse(raw)
        if result is None:
            raise ValueError(f"{out}: line {line} is no answer of xpar generate or score; give another --out")
        facts = facts_of(result)
        _check_settings(out, line, facts, settings)
        if facts["hash"] in hashes:
            answers[facts["hash"]] = result
    return answers


def read_samples(out: Path, hashes: Collection[str], settings: str) -> list[Result]:
    """Read the samples beside ``out`` of prompts of ``hashes``; [] without ``out``. Else as for answers."""
    path = samples_path(out)
    if not out.exists() or not path.exists():
        return []
    found: list[Result] = []
    for line, raw in enumerate(path.read_bytes().split(b"\n")[:-1], start=1):
        result = _parse(raw)
        if result is not None and isinstance(result.get("sample"), int):
            _check_settings(path, line, result, settings)
            found += [result] * (result["hash"] in hashes)
    return found


def read_failures(out: Path, hashes: Collection[str], settings: str) -> dict[str, Result]:
    """Read the failures beside ``out`` of prompts of ``hashes``, by hash; {} without ``out``.

    Lines that are no prompts are left out, as they are read anew. ValueError for one of other ``settings``.
    """
    failures: dict[str, Result] = {}
    path = errors_path(out)
    if not out.exists() or not path.exists():
        return failures
    for line, raw in enumerate(path.read_bytes().split(b"\n")[:-1], start=1):
        result = _parse(raw)
        facts = {} if result is None else facts_of(result)
        if result is not None and is_failure(result) and isinstance(facts.get("line"), int):
            _check_settings(path, line, facts, settings)
            if facts["hash"] in hashes:
                failures[facts["hash"]] = result
    return failures


def _check_settings(path: Path, line: int, facts: Mapping[str, Any], settings: str) -> None:
    if facts["settings"] == settings:
        return
    what = ", ".join(differences(str(facts["settings"]), settings)) or "of an earlier version of xpar"
    raise ValueError(
        f"{path}: line {line} was answered with another model or other options; different: {what}. Resume "
        "with those of that run, or give another --out"
    )


def _parse(raw: bytes) -> Result | None:
    try:
        result = json.loads(raw)
    except (ValueError, RecursionError):
        return None
    if not isinstance(result, dict):
        return None
    facts = facts_of(result)
    return result if isinstance(facts.get("hash"), str) and "settings" in facts else None


def open_answer_file(out: Path, answers: Iterable[Result]) -> None:
    """Replace the file ``out`` by one of ``answers`` alone."""
    _replace(out, [_line(result) for result in answers])


Merge = Callable[[str, Sequence[Choice]], Result]
"""Hash of a work item and the choices of all its samples -> its answer."""


class AnswerFile:
    """The answers in ``out``, made by :func:`open_answer_file`; failures are in a file beside it.

    ``merge``: makes the answer of a prompt with several samples, which wait in another file until all are
    there. ``answered``, ``failed``: how many prompts so far.
    """

    def __init__(self, out: Path, merge: Merge | None = None) -> None:
        self.out, self._merge = out, merge
        self.answered = self.failed = 0
        self._answers = _Appender(out)
        self._others: dict[Path, _Appender] = {}
        waiting = samples_path(out).read_bytes().splitlines() if samples_path(out).exists() else []
        self._samples = Samples(map(json.loads, waiting))
        self._lost: set[str] = set()

    def append(self, results: Collection[Result]) -> None:
        """Write ``results`` and wait for the disk; OSError where it is full, and what was there stays."""
        failures = [result for result in results if is_failure(result) and self._is_first_failure(result)]
        samples = [result for result in results if "sample" in result and not is_failure(result)]
        answers = [result for result in results if "sample" not in result and not is_failure(result)]
        self._write_beside(errors_path(self.out), failures)
        self.failed += len(failures)
        self._write_beside(samples_path(self.out), samples)
        for sample in samples:
            choices = self._samples.add(sample)
            if choices is not None and self._merge is not None:
                answers.append(self._merge(sample["hash"], choices))
        self._answers.append(answers)
        self.answered += len(answers)

    def _is_first_failure(self, result: Result) -> bool:
        """Note the failure of a prompt, of which other samples may fail, too."""
        lost = str(facts_of(result)["hash"])
        is_first = lost not in self._lost
        self._lost.add(lost)
        return is_first

    def _write_beside(self, path: Path, results: Collection[Result]) -> None:
        if results:
            if path not in self._others:
                self._others[path] = _Appender(path)
            self._others[path].append(results)

    def close(self) -> None:
        self._answers.close()
        for file in self._others.values():
            file.close()

    def finish(self, order: Mapping[str, int]) -> None:
        """Close the files and sort their lines by ``order`` (hash -> place), errors by their lines."""
        self.close()
        lines = self.out.read_bytes().splitlines(keepends=True)
        _replace(self.out, sorted(lines, key=lambda line: order[facts_of(json.loads(line))["hash"]]))
        if self.failed:
            path = errors_path(self.out)
            errors = path.read_bytes().splitlines(keepends=True)
            _replace(path, sorted(errors, key=lambda line: facts_of(json.loads(line))["line"]))
        samples_path(self.out).unlink(missing_ok=True)


class _Appender:
    """A file that grows by whole results, which are on the disk when :meth:`append` returns."""

    def __init__(self, path: Path) -> None:
        self.path = path
        # Open as long as the job answers; without a buffer, which would be written once more when the process
        # ends.
        self._file: FileIO = open(path, "ab", buffering=0)  # noqa: SIM115

    def append(self, results: Iterable[Result]) -> None:
        try:
            text = memoryview(b"".join(_line(result) for result in results))
            while text:
                text = text[self._file.write(text) :]
            os.fsync(self._file.fileno())
        except OSError as error:
            raise OSError(
                f"{self.path}: cannot be written ({error.strerror}); the answers before are kept: make room, "
                "then run again with --resume"
            ) from None

    def close(self) -> None:
        self._file.close()


def _line(result: Result) -> bytes:
    try:
        return (json.dumps(result, ensure_ascii=False) + "\n").encode()
    except UnicodeEncodeError:  # half of a surrogate pair, which JSON can say and UTF-8 cannot
        return (json.dumps(result) + "\n").encode()


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
