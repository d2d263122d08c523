"""Sub-graphs that loops call: what becomes a buffer of them, and how they are compiled."""
