"""A program cut among ranks: which node works on each rank's own tokens alone, and what stands in its place.

``program`` walks through a graph and its checkpointed layers, ``readings`` asks the proof (:mod:`mst_fx.rows.tokens`) how a node may read
its operands, ``values`` writes nodes, ``sites`` puts the exchanges around attention. Compile time only; nothing here knows options.
"""
