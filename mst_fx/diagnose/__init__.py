"""For people: what was rewritten, what was not and why, what it saves; the command line.

It may import everything. Nobody imports it but ``mst_fx/__init__`` and the entry points: it listens to the pipeline
(:mod:`mst_fx.listeners`).

``explain`` and ``watch`` are the ways in, ``findings`` has the words. ``facts``, ``estimate`` and ``lines`` say what one graph
is; ``doctor`` says what follows, ``warn`` says some of it to everybody. ``model_of`` makes what the command line names,
``cli`` prints, ``page`` (with ``page.html``) is what ``mst-fx diff --html`` writes.
"""
