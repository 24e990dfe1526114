"""Communicators of device tensors: the GPU of each rank, the choice of a transport, transports.

A transport is one way to move rows between GPUs (NCCL, MPI, or staging through host memory). A
backend is its connection of one group of ranks.
"""
