"""An attention mask as a formula of positions: read from a graph, evaluated for a chunk, held by a tensor.

``formula`` says what a mask is and ``reach`` evaluates it: these two run in a step, and know no FX type. ``sites`` finds attention
in a graph, ``read``, with ``boolean``, ``constants`` and ``reader``, reads its mask, and ``understand`` says what both come to. ``tensor`` holds a mask
between graphs. Nothing here knows passes or options: what is done about a mask is decided in ``passes/attention``.
"""
