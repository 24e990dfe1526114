"""Prompts in, answers out: files of prompts and texts, batches of sequences, decoding, scoring, answer files."""
