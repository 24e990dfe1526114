"""Token movement: plan, dispatch and combine, one module per dispatcher.

``base`` holds the contract and ``choose`` the choice. README.md draws who holds which rows after each step.

Letters: T tokens of this rank, H hidden size, E experts, k experts per token, R ranks of the ``moe`` group, N
nodes, S rows that this rank sends, M rows that arrive at this rank.
"""
