"""Communicators of device tensors: each rank's GPU and the transports.

A transport is one way to move rows between GPUs (NCCL, MPI, or staging through host memory). A
backend is its connection of one group of ranks.
"""
