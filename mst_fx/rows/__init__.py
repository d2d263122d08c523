"""The proof that a part of a graph works on each row (token) alone.

``rules`` says which ATen operators are row-wise and where their rows lie, ``analysis`` runs each node under them, ``region``
finds the bulges and their narrowest boundary, ``refusals`` says why others are left alone. Compile time only: nothing here
runs in a step, changes a graph or knows loops.
"""
