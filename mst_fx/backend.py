"""Where torch finds the backend: ``torch.compile(model, backend="mst")`` imports this, and with it all that listens."""

from mst_fx.api import mst as mst
