"""The languages in which configurations name modules.

What such a list says is compared with the file, and never decides: see :mod:`xpar.engine.formats`.
"""

import re
from collections.abc import Iterable
from fnmatch import fnmatchcase


def is_path_or_end(module: str, patterns: Iterable[object]) -> bool:
    """Match as transformers does for fp8, MXFP4 and AWQ: a regex from the start, or a plain end.

    Both must end at a dot or at the end of the name: ``gate`` is not ``gate_proj``. Entries that are no text,
    such as null, match nothing.
    """
    return any(_starts(module, p) or module == p or module.endswith("." + p) for p in _texts(patterns))


def _starts(module: str, pattern: str) -> bool:
    try:
        return re.match(rf"(?:{pattern})(?:(?<=\.)|(?=\.|$))", module) is not None
    except re.error:  # a plain name with letters that are special in a regex
        return False


def is_target(module: str, pattern: str) -> bool:
    """Match as compressed-tensors does: an exact path, or ``re:`` and a regex from the start."""
    if pattern.startswith("re:"):
        return re.match(pattern[3:], module) is not None
    return module == pattern


def is_glob(module: str, patterns: Iterable[object]) -> bool:
    """Match as ModelOpt does: shell patterns, whose ``*`` crosses dots."""
    return any(fnmatchcase(module, p) for p in _texts(patterns))


def _texts(patterns: Iterable[object]) -> list[str]:
    return [pattern for pattern in patterns if isinstance(pattern, str)]
