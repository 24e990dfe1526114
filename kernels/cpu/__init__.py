"""Kernels for host processors, in files named ``<operation>_<backend>.py``.

Operations: ``experts``, ``linear`` (dense layers) and ``attention``.

Backends: ``onednn`` (torch's own library), ``zen`` (the optional package zentorch) and ``native`` (this
    package's C code).
"""
