"""Kernels for host processors, in files named ``<operation>_<backend>.py``.

Operations are ``experts``, ``linear`` (dense layers) and ``attention``. Backends are ``onednn`` (torch's own
library), ``zen`` (the optional package zentorch) and ``native`` (this package's C code). The choice of a
backend is in ``linear.py``, ``attention.py`` and ``paged_attention.py``, that of experts in
:mod:`xpar.kernels.registry`.

``<library>_library.py`` calls compiled code through ``ctypes`` or zentorch's operators. ``host.py`` asks what
the processor has, and ``sorted_slots.py`` is what kernels of experts share.
"""
