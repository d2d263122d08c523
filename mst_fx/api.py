"""What ``mst_fx`` has for programs, all of it imported: :mod:`mst_fx` hands its names on, and torch finds the backend here."""

from __future__ import annotations

import mst_fx.ops  # noqa: F401  (registers the operators, which graphs name)
from mst_fx.compiling import mst
from mst_fx.declared import declare_row_wise
from mst_fx.diagnose.check_rows import check_row_wise
from mst_fx.diagnose.explain import explain
from mst_fx.diagnose.findings import Diagnosis, Finding
from mst_fx.diagnose.warn import warn, warn_eager_checkpoint
from mst_fx.diagnose.watch import watch
from mst_fx.enabling import enable
from mst_fx.errors import GroupError, OptionError, Refusal
from mst_fx.listeners import on_eager_checkpoint, on_graph
from mst_fx.logits.gathered import gather_rows
from mst_fx.options import Options
from mst_fx.parking.parked import Parking, park
from mst_fx.pipeline import rewrite
from mst_fx.ranks.batches import SharedBatches, shared_batches
from mst_fx.report import Refused, Report, Rewrite

__all__ = [
    "Diagnosis",
    "Finding",
    "GroupError",
    "OptionError",
    "Options",
    "Parking",
    "Refusal",
    "Refused",
    "Report",
    "Rewrite",
    "SharedBatches",
    "check_row_wise",
    "declare_row_wise",
    "enable",
    "explain",
    "gather_rows",
    "mst",
    "park",
    "rewrite",
    "shared_batches",
    "watch",
]

# Whoever compiles with mst, by the entry point too, imports this: what costs the whole saving is said to everybody.
on_graph.add_own(warn)
on_eager_checkpoint.add_own(warn_eager_checkpoint)
