"""The version, where setuptools reads it without importing torch.

It is part of each body's key, and so of torch's caches of compiled graphs, which see no other sign that an operator of ours
has changed: raise it whenever one does.
"""

__version__ = "0.2.4"
