"""Every private part of torch that is called or imported, each with the reason and the versions tried.

Private is what has a ``_`` in its path or name, and ``torch.fx.experimental``, which promises nothing. Everybody may import
this room and it imports nobody, so that a new version of torch is met here alone (``tests/house/test_torch_api.py``).

``inductor`` compiles graphs and bodies, ``joint`` lets them be changed with their backward pass, ``trace`` writes
them where tlparse reads; ``guards`` keeps guards on sizes from being made. ``dynamo`` asks who captures what, and why
a graph ends, ``checkpoints`` which layers it gives up; ``modes`` are autocast, grad mode, dispatch; ``autograd`` is
what it saves and one backward pass; ``fakes`` traces on fake tensors; ``symbols`` are sizes that are not numbers yet,
``symbolic_rows`` one of our own; ``tensors`` storages, versions, subclasses and trees; ``ops`` operators as objects;
``graphs`` GraphModules; ``attention`` the fused kernels, ``gpu_attention`` what they would give on a GPU that is not there;
``overwriting`` says over which operands loops and attention may write, ``written_in_place`` lets the kernels that Inductor makes do so, ``settled_views``
mends its views; ``quick_cuts`` finds the partitioner's cut sooner; ``shards`` are DTensors and their parts here, ``storages`` a meter of memory on ``meta``.
"""
