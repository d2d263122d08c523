"""RUN TIME: one sequence over the ranks of a group. Who has which rows and heads, and the collectives that move them.

A step runs ``collectives``, which stand in a graph and are taken apart when it is traced: no operator hides one. Nothing here
knows graphs; what is cut, and where, is decided in :mod:`mst_fx.cutting`.
"""
