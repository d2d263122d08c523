"""The longest sequence that trains on this GPU, predicted from two short runs and then tried: ``python -m tools.max_context``.

``forecast`` and ``search`` are arithmetic, ``train`` is one run in a process of its own, ``tables`` what is written.
"""
