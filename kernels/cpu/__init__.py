"""Expert kernels for host processors."""
