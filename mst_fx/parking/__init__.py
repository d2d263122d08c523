"""States of optimizers in the host's memory while forward and backward passes run.

``homes`` has the memory and the copies, ``parked`` an optimizer's step in buckets. Nothing of graphs lives here, and nothing
of torch that is not public: hooks of a step and of a state dict.
"""
