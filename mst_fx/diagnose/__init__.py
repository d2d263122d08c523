"""For people: what was rewritten, what was not and why, what it saves; the command line.

It may import everything. Nobody imports it but ``mst_fx/__init__`` and the entry points: it listens to the pipeline.
"""
