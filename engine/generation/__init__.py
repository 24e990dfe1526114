"""Generation: prompts in, answers out.

Here are files of prompts and texts, tokens, batches of sequences, decoding, scoring, and files of answers.
B sequences or texts of a batch, S columns, V vocabulary, H hidden size.
"""
