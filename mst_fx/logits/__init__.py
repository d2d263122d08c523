"""Logits that compute themselves on first use.

``take_out`` takes them out of a rewritten graph, ``put_back`` puts the ``tensor`` in their place, which is computed from its
``source``; ``uses`` are those that need no values, ``calls`` all others. ``take_out`` runs at compile time, all else in a step; no
pass but the one that defers logits knows this room.
"""
