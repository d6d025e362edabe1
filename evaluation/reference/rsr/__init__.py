"""Rapid Synaptic Refinement: a small set of connections is trained, in rounds; the rest costs nothing."""
