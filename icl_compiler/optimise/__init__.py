"""The search of `icl compile -O2` and `-O3`: programs of different settings, raced on held-out rows of the pool."""
