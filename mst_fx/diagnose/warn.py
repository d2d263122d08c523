"""One warning a process and cause, where a step of training keeps what mst-fx is there to avoid.

Findings (:mod:`mst_fx.diagnose.doctor`) are for those who ask. These few are said to everybody, because what they cost is the
whole saving: logits of all rows are made, or S x S masks. Each graph is looked at by itself, when it is compiled.
"""

from __future__ import annotations

import contextlib
import contextvars
import logging
from collections.abc import Iterator

import torch
from torch import fx

from mst_fx.diagnose.doctor import COSTLY, eager_checkpoint, said_of
from mst_fx.diagnose.facts import facts_of
from mst_fx.diagnose.findings import Diagnosis, Finding, diagnosis_of
from mst_fx.process import Said
from mst_fx.report import Report
from mst_fx.torch_api.dynamo import Ending

log = logging.getLogger("mst_fx")

# Bytes of wide values that a step keeps, or makes: less is not worth a word. 2,048 rows of 32 float32 logits.
LEAST_BYTES = 2**18

_SILENCE = 'mst_fx says this once; logging.getLogger("mst_fx").setLevel(logging.ERROR) silences it'

_SAID = Said()
_is_silent = contextvars.ContextVar("mst_fx_is_silent", default=False)


@contextlib.contextmanager
def silent() -> Iterator[None]:
    """Says nothing inside of the context: who asks for findings gets them anyway."""
    token = _is_silent.set(True)
    try:
        yield
    finally:
        _is_silent.reset(token)


def warn(captured: fx.GraphModule, new: fx.GraphModule, report: Report) -> None:
    """Says what one captured graph costs a step of training; listens to :data:`mst_fx.listeners.on_graph`."""
    if not torch.is_grad_enabled() or _is_silent.get() or not report.kinds():
        return
    one = diagnosis_of(report)
    one.facts.append(facts_of(captured, report))
    for check in COSTLY:
        found = check(one, LEAST_BYTES)
        if found is not None:
            _say(found)


def warn_eager_checkpoint(ending: Ending) -> None:
    """Says that a checkpointed layer runs eagerly: whoever checkpoints has no memory to spare; listens to
    :data:`mst_fx.listeners.on_eager_checkpoint`."""
    found = eager_checkpoint(Diagnosis(eager_checkpoints=[said_of(ending)]))
    if found is not None and torch.is_grad_enabled() and not _is_silent.get():
        _say(found)


def _say(found: Finding) -> None:
    if _SAID.is_new(found.cause):
        log.warning("%s: %s.\n  fix: %s.\n  (%s)", found.cause, found.evidence, found.fix, _SILENCE)
