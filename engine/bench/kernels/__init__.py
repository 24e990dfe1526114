"""Checks and timing of the expert kernels of one GPU, and the search for their tile shapes.

The kernels are compared with float64, with their peers, and with the limits of the GPU.
"""
