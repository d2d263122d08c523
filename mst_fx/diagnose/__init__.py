"""For people: what was rewritten, what was not and why, what it saves; the command line.

It may import everything. Nobody imports it but ``mst_fx/__init__`` and the entry points: it listens to the pipeline
(:mod:`mst_fx.listeners`).

``explain`` and ``watch`` are the ways in. ``facts``, ``estimate`` and ``lines`` say what one graph is; ``doctor`` has the words
of every finding and warning, ``findings`` their types; ``warn`` says some of them to everybody, each once. ``model_of`` makes
what the command line names, ``cli`` prints, ``page`` (with ``page.html``) is what ``mst-fx diff --html`` writes.
"""
