"""Whole models: transformers' own code around xpar's experts, loaded piece by piece, answering prompts on all ranks."""
