"""Retrieval of examples: texts in, row numbers and scores out. Knows no labels, prompts or language models."""
