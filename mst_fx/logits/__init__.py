"""Logits that compute themselves on first use.

``take_out`` takes them out of a rewritten graph, ``put_back`` puts the tensor of ``tensor`` in their place, ``uses`` knows which uses
need no values. ``take_out`` runs at compile time, all else in a step; no pass but the one that defers logits knows this room.
"""
