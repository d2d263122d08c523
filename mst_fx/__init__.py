"""mst-fx: ``torch.compile(model, backend="mst")`` trains transformers on very long sequences.

``import mst_fx`` imports nothing of torch: the first name that is asked for brings all of :mod:`mst_fx.api`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from mst_fx.version import __version__

if TYPE_CHECKING:
    from mst_fx.api import (
        Diagnosis,
        Finding,
        GroupError,
        OptionError,
        Options,
        Parking,
        Refusal,
        Refused,
        Report,
        Rewrite,
        SharedBatches,
        check_row_wise,
        declare_row_wise,
        enable,
        explain,
        gather_rows,
        mst,
        park,
        rewrite,
        shared_batches,
        watch,
    )

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
    "__version__",
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


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module("mst_fx.api"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
