"""Benchmarks: ``python -m tools.bench`` compares contenders on a GPU; the others are ``python -m tools.bench.NAME``.

``chunks`` (a GPU), ``memory``, ``compile`` and ``accumulation`` (a CPU) measure one thing each. ``models`` is what is
trained, ``contenders`` are ways to train it, ``runner`` runs one of them, ``tables`` writes what was found.
"""
