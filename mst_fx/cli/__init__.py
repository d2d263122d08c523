"""The command line ``mst-fx``: reads what was typed without importing torch, and imports what does it afterwards.

``main`` is the way in: ``arguments`` has the parser, ``typed`` reads values as people type them. Each command is a module with a
function ``run(arguments)`` that returns the exit code, imported when it is called: ``show`` (explain, diff, doctor), ``fit``, ``program``
(run). Nobody imports this room.
"""
