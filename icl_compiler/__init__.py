"""The compiler: a labelled dataset and a frozen language model in, a program that writes prompts out."""
