"""The checks and timings of one GPU's expert kernels, and the search for their tile shapes.

Outputs are compared with float64, times with those of peers and with the limits of the GPU.
"""
