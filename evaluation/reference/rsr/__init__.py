"""Rapid Synaptic Refinement: a small, changing set of connections is trained, the rest costs nothing."""
