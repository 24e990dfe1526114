"""Expert kernels and row moving on GPUs, in Triton. Only :mod:`~xpar.kernels.gpu.availability` imports without Triton."""
