"""What is rewritten in each architecture of transformers, and whether the numbers are eager's: ``python -m tools.sweep``.

``configs`` makes tiny models, ``attempt`` tries one, ``page`` writes docs/models.md.
"""
