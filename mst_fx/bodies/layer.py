"""A layer that stands several times in a graph, as one graph of both its passes.

The operators of :mod:`mst_fx.ops.layer` name it by its key, as loops do their bodies.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import fx

from mst_fx.errors import Refusal
from mst_fx.process import Named
from mst_fx.torch_api import layers, overwriting
from mst_fx.torch_api.autograd import without_saved_tensors_hooks
from mst_fx.torch_api.fakes import FakeTensorMode, mode_of
from mst_fx.version import __version__


class LayerGraph:
    """A layer as a function of its inputs, forward and backward.

    Attributes:
        key: names it by content; equal keys, same graph.
        needs: which inputs get a gradient.
        reads: the inputs, by number, that the backward pass reads: what is kept for it.
        outputs, gradients: fakes of what the forward pass gives, and of the gradients of the inputs that get one.
        path: of a module of the first that there is; "" if it is not known.
    """

    def __init__(
        self,
        joint: fx.GraphModule,
        needs: Sequence[bool],
        outputs: int,
        mode: FakeTensorMode,
        config: Any,
        path: str = "",
    ) -> None:
        """
        Args:
            joint: ``(*inputs, *tangents)`` → ``(*outputs, *gradients)``, ATen, with None for inputs that get no gradient.
            mode: of the fakes in it.
            config: what it is compiled with, as a part of the key.
        """
        self.needs, self._joint, self._mode, self.path = tuple(needs), joint, mode, path
        self._count = outputs
        forward, backward = self._results(joint)
        self.outputs, self.gradients = ([x.meta["val"] for x in each] for each in (forward, backward))
        read = layers.inputs_read(joint, backward)
        self.reads = tuple(index for index in read if index < len(needs))
        metas = [
            (x.shape, x.stride(), x.dtype, x.device)
            for node in joint.graph.find_nodes(op="placeholder")
            for x in [node.meta["val"]]
        ]
        constants = [_constant(joint, node) for node in joint.graph.find_nodes(op="get_attr")]
        known = (joint.code, metas, constants, self.needs, self.reads, outputs, config)
        content = repr((*known, torch.__version__, __version__))
        # A graph of AOTAutograd's cache was made of the layer by what stands in these files.
        code = b"".join(Path(inspect.getfile(each)).read_bytes() for each in (layers, overwriting))
        self.key = hashlib.sha256(content.encode() + code).hexdigest()[:32]

    def _results(self, joint: fx.GraphModule) -> tuple[list[fx.Node], list[fx.Node]]:
        found: Any = joint.graph.output_node().args[0]
        return list(found[: self._count]), [x for x in found[self._count :] if x is not None]

    @functools.cached_property
    def both_passes(self) -> fx.GraphModule:
        """``(*inputs, *tangents)`` → ``(*outputs, *gradients)``, as Inductor leaves it in front of its partitioner."""
        return layers.simplified(self._joint, self._mode)

    def prepare(self) -> None:
        """Makes what it is asked for when a graph is written."""
        _ = self.both_passes

    @functools.cached_property
    def _prepared(self) -> fx.GraphModule:
        return layers.prepared(self.both_passes)

    @functools.cached_property
    def forward_graph(self) -> fx.GraphModule:
        """``inputs`` → outputs."""
        return layers.part(self._prepared, self._results(self._prepared)[0], range(len(self.needs)))

    @functools.cached_property
    def backward_graph(self) -> fx.GraphModule:
        """``(*inputs that it reads, *tangents)`` → gradients; what the forward pass has made is made again."""
        inputs = self._prepared.graph.find_nodes(op="placeholder")
        kept = {*self.reads, *range(len(self.needs), len(inputs))}
        return layers.part(self._prepared, self._results(self._prepared)[1], kept)


def traced_alone(
    function: Callable[..., Any], given: Sequence[torch.Tensor], has_backward: bool
) -> fx.GraphModule:
    """The graph of both passes of a layer (:func:`mst_fx.torch_api.layers.both_passes`).

    Args:
        given: fakes of what it is given in one place, to which new ones are like.

    Raises:
        Refusal: if it writes to what it is given, or gives it.
    """
    mode = mode_of(given[0])
    with mode:
        fakes = [
            torch.empty_strided(
                x.shape, x.stride(), dtype=x.dtype, device=x.device, requires_grad=x.requires_grad
            )
            for x in given
        ]
    try:
        with without_saved_tensors_hooks():
            return layers.both_passes(function, fakes, mode, has_backward)
    except RuntimeError as error:
        raise Refusal(f"a layer cannot be traced alone: {str(error).splitlines()[0][:200]}") from None


def _constant(gm: fx.GraphModule, node: fx.Node) -> Any:
    """What a constant of a graph is, by content: the graph's code has its name alone."""
    found = getattr(gm, str(node.target))
    if not isinstance(found, torch.Tensor):
        return repr(found)
    raw = found.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    digest = hashlib.sha256(bytes(raw.tolist())).hexdigest()
    return tuple(found.shape), found.stride(), found.dtype, found.device, digest


# Kept alive by who runs a graph that names one, as bodies are.
LAYERS: Named[LayerGraph] = Named()
