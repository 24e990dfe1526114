"""Communicators of device tensors: which GPU a rank has, which transport serves it, and the transports."""
