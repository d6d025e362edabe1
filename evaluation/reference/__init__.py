"""Fine-tuned references: how each is trained, saved, loaded, and read as a predictor."""
