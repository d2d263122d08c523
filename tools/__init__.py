"""What a developer or a user runs, as ``python -m tools.NAME`` from the root of the repository; not part of the wheel.

It may import mst_fx; nothing of mst_fx imports it. ``graph_diff.py`` is a file to be run; ``bench``, ``max_context`` and
``sweep`` are packages with a ``__main__``; ``meters`` measure memory, and serve tests too.
"""
