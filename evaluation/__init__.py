"""The evaluator: how far a prompted base model is from its fine-tuned reference, and how sure we are."""
