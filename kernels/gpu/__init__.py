"""Expert kernels, routing and row moving on GPUs, in Triton.

Only :mod:`~xpar.kernels.gpu.availability` and :mod:`~xpar.kernels.gpu.tile_tables` can be imported without
Triton.
"""
