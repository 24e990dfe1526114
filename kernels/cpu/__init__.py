"""Kernels for host processors, in files named ``<operation>_<backend>.py``.

Operations are ``experts``, ``linear`` (dense layers) and ``attention``. Backends are ``onednn`` (torch's own
library), ``zen`` (the optional package zentorch) and ``native`` (this package's C code).
"""
