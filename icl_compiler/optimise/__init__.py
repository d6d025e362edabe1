"""The search of `icl compile -O2`: programs that differ in their settings, raced on held-out rows of the pool."""
