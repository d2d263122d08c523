"""The passes, one file each; :mod:`mst_fx.pipeline` runs them in order. Passes do not import each other."""
