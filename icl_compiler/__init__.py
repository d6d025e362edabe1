"""The compiler: a labelled dataset and a frozen language model in, a program that writes prompts out."""

import os

# Matrix products are cut up, and rounded, by how many threads there are. So that a program is the same, byte for byte,
# on any number of them, Intel's library is asked to cut alike. It is no slower here. It listens before its first
# product only.
os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")
