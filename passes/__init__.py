"""The passes, one file each; :mod:`mst_fx.pipeline` runs them in order. Passes do not import each other.

``attention``, ``mlp`` and ``vocab`` make loops. For vocab, losses are brought into one form: ``sum_losses`` (which spellings are a
sum of row losses), ``picks``, ``gathered_rows``, ``one_hots``, ``stacks``, ``row_slices``. ``mask_breaks`` is run by the backend. With
``sequence_parallel`` ``experts`` and ``sequence`` come before the loops, ``row_outputs`` behind them.
"""
