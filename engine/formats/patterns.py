"""The languages in which configurations name modules, compiled once for lists of thousands.

What such a list says is compared with the file, and never decides: see :mod:`xpar.engine.formats`.
"""

import re
from collections.abc import Callable, Iterable
from fnmatch import translate

Matcher = Callable[[str], bool]
BOUNDARY = r"(?:(?<=\.)|(?=\.|$))"
"""The end of a component of a module's name."""


def path_or_end(patterns: Iterable[object]) -> Matcher:
    """Match as transformers does for fp8, MXFP4 and AWQ: a regex from the start, or a plain end.

    Both must end at a dot or at the end of the name: ``gate`` is not ``gate_proj``. Entries that are no text,
    such as null, match nothing.
    """
    texts = _texts(patterns)
    regex = _any_of(texts, BOUNDARY)
    ends = tuple(f".{text}" for text in texts)
    return lambda module: regex(module) or f".{module}".endswith(ends)


def targets(patterns: Iterable[object]) -> Matcher:
    """Match as compressed-tensors does: an exact path, or ``re:`` and a regex from the start."""
    texts = _texts(patterns)
    names = {text for text in texts if not text.startswith("re:")}
    regex = _any_of([text[3:] for text in texts if text.startswith("re:")])
    return lambda module: module in names or regex(module)


def globs(patterns: Iterable[object]) -> Matcher:
    """Match as ModelOpt does: shell patterns, whose ``*`` crosses dots."""
    return _any_of([translate(text) for text in _texts(patterns)])


def _any_of(patterns: Iterable[str], end: str = "") -> Matcher:
    """Match any of some regexes from the start; what is no regex matches nothing."""
    valid = [pattern for pattern in patterns if _is_regex(pattern)]
    if not valid:
        return lambda module: False
    regex = re.compile(f"(?:{'|'.join(f'(?:{pattern})' for pattern in valid)}){end}")
    return lambda module: regex.match(module) is not None


def _is_regex(pattern: str) -> bool:
    try:
        re.compile(f"(?:{pattern})")
    except re.error:
        return False
    return True


def _texts(patterns: Iterable[object]) -> list[str]:
    return [pattern for pattern in patterns if isinstance(pattern, str)]
