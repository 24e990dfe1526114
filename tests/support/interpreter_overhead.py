"""Triton's interpreter without the work that it repeats, which is most of the time that a small tile takes.

Nothing that it computes or refuses changes. ``triton_interpreter`` installs this.
"""

import functools
from dataclasses import replace

import numpy as np
import triton.language as tl
from triton.runtime import interpreter

_patch_lang = interpreter._patch_lang
_numpy_dtype = functools.cache(interpreter._get_np_dtype)


def patch_once(fn):
    """Leave out what a running kernel has patched: Triton patches again for each function that it calls."""
    seen = [lang for lang in (tl, tl.core) if any(value is lang for value in fn.__globals__.values())]
    if seen and not any(tl.core.is_builtin(part.add) for part in seen):
        return interpreter._LangPatchScope()
    return _patch_lang(fn)


def numpy_dtype(dtype):
    """The scalar's type in NumPy, from a table that Triton makes anew for each question."""
    scalar = dtype.scalar
    return np.dtype(np.uint64) if isinstance(scalar, tl.pointer_type) else _numpy_dtype(scalar)


def install():
    """Patch the interpreter of this process."""
    # Triton computes everything again in int64 for an assertion that it then makes in its debug mode alone.
    options = interpreter.interpreter_builder.options
    interpreter.interpreter_builder.options = replace(options, sanitize_overflow=options.debug)
    interpreter._patch_lang = patch_once
    interpreter._get_np_dtype = numpy_dtype
