"""An attention mask as a formula of positions: read from a graph, evaluated for a chunk, held by a tensor.

It knows nothing of passes or options: what is done about a mask is decided in ``passes/attention``.
"""
