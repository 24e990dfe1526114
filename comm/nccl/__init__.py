"""NCCL between the ranks of a group: the library, communicators started over MPI, and rows moved by them."""
