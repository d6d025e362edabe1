"""Retrieval of examples: texts in, row numbers and scores out; knows no labels, prompts or models."""
