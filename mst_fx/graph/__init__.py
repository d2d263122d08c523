"""What an FX graph says of itself: values, sizes, spellings, modes, effects; how it is copied and edited.

Nothing here knows rows, chunks or any rewrite of ours: what would be true of anybody's graph lives here.
It imports ``torch_api`` and the words of the hall (``errors``) only.
"""
