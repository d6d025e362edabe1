"""Calibration: from the language model's law of the label words to probabilities that mean what they say.

`votes` and `law` are what a program does with an answer; `methods` fits, `choosing` compares by held-out risk, and
`held_out` asks the model about rows of the pool. Only the last one runs a model, and only at compile time.
"""
