"""What torch's compilers do beside compiling, and no test asks for: left out while tests run.

Nothing here changes a graph, a guard or a number.
"""

from __future__ import annotations

import gc
import logging
import types
from typing import Any

import torch
import torch._dynamo.guards
import torch._dynamo.symbolic_convert
import torch._inductor.config
import torch._subclasses.fake_tensor
from torch._functorch._aot_autograd import graph_compile
from torch.fx.experimental import recording
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from tests import kernels


def compilers() -> None:
    """Leaves it out in this process, for good.

    Tried with torch 2.11.0 and 2.13.0, whose names these are.
    """
    torch._dynamo.config.run_gc_after_compile = False
    torch._dynamo.guards.profile_guard_manager = lambda *_: 0.0  # type: ignore[attr-defined]  # 30 ms
    # Without vector instructions, whose headers are most of what the C++ compiler reads: 0.6 s instead of 0.9 s a kernel.
    torch._inductor.config.cpp.simdlen = 1
    torch._inductor.config.cpp.vec_isa_ok = False  # three programs are compiled to find which there are
    kernels.together()
    # The stack that a mode of fakes was made on, read and formatted for a message about two modes: 0.5 ms.
    nothing: Any = types.SimpleNamespace(extract_stack=list, format_list=list)
    torch._subclasses.fake_tensor.traceback = nothing  # type: ignore[attr-defined]
    _events_of_shapes()
    _texts()


def _texts() -> None:
    """Leaves out texts for logs that are made whether or not anybody reads them."""
    # The name of the function that each call is in: a file is read by tokens for it, 0.1 s for a long one, in each process.
    torch._dynamo.symbolic_convert.get_funcname = lambda filename, lineno: None  # type: ignore[attr-defined]
    torch._dynamo.config.side_effect_replay_policy = (
        "silent"  # where each attribute was written, by the stack: 15 ms
    )
    # Joint graph, forward and backward graph as code, with shapes: for the structured trace and the logs of AOTAutograd.
    graphs: Any = graph_compile
    graphs._log_joint_graph = lambda *_: None
    graphs._log_fw_bw_graphs = lambda *_: (None, None)


def _events_of_shapes() -> None:
    """Leaves out what asks, at each sum or product of two sizes, whether it shall be recorded for translation validation."""
    for name, method in list(vars(ShapeEnv).items()):
        code = getattr(method, "__code__", None)
        if code is not None and code.co_filename == recording.__file__:
            setattr(ShapeEnv, name, method.__wrapped__)


def trace() -> None:
    """Leaves the structured trace, which writes every graph and every guard as a text, to those who ask for it.

    It is on as soon as its logger has a handler, and pytest gives one to each logger that does not propagate.
    """
    logging.getLogger("torch.__trace").propagate = True


def collections() -> None:
    """What was imported is here to stay: collections of garbage, which torch's compilers cause, need not look at it."""
    gc.freeze()
    gc.set_threshold(200_000, 10, 10)
    gc.enable()
