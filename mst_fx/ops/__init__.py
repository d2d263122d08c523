"""RUN TIME: the custom operators that a training step runs.

A step never reaches the proof: nothing here imports ``rows``, edits a graph or knows an FX type. Importing this
package registers all of them.
"""
