"""The memory of a step over its time, for people: bytes alive, and what they are where they are most."""

from __future__ import annotations

import re

from torch import fx

from mst_fx.graph.names import clean_path, module_path
from mst_fx.graph.spelling import operation
from mst_fx.plan.choices import choices_of
from mst_fx.plan.joint_graph import JointGraph, source_of, storage_of
from mst_fx.plan.layers import layers_of
from mst_fx.plan.peak import Held, calls_of, curve_of, held_by, scratch_of
from mst_fx.plan.recompute import on_trial
from mst_fx.report import Alive, Timeline

_SHOWN = 5  # of what is alive at the peak


def timeline_of(joint: JointGraph) -> Timeline:
    """What is alive while each call runs, beside inputs, and at the highest moment the largest by name."""
    calls, held = calls_of(joint), held_by(joint)
    curve = curve_of(joint, held)
    forward = sum(node not in joint.backward for node in calls)
    kept = sum(each.bytes for each in held if each.first < forward <= each.last)
    top = max(range(len(curve)), key=curve.__getitem__, default=0)
    gradients = {storage_of(node) for node in joint.gradients if node is not None}
    found: dict[tuple[str, str], list[int]] = {}
    for each in held:
        if each.first <= top <= each.last:
            found.setdefault(_name_of(each, gradients), []).append(each.bytes)
    if calls and scratch_of(calls[top]):
        found.setdefault((f"while {operation(calls[top])} runs", ""), []).append(scratch_of(calls[top]))
    alive = [Alive(name, where, len(sizes), sum(sizes)) for (name, where), sizes in found.items()]
    largest = sorted(alive, key=lambda one: -one.bytes)[:_SHOWN]
    return Timeline(tuple(curve[:forward]), tuple(curve[forward:]), kept, tuple(largest))


def with_most_kept(graph: fx.Graph) -> JointGraph:
    """A joint graph, copied, whose layers keep all that is worth keeping, as torch's partitioner cuts it: casts are made again."""
    joint = JointGraph(graph)
    wanted = joint.kept_anyway
    chosen = [choices_of(layer, wanted)[-1] for layer in layers_of(joint)[:-1]]
    return on_trial(graph, chosen, is_planned=False)[0]


def _name_of(held: Held, gradients: set[fx.Node]) -> tuple[str, str]:
    """What a value is called, the same for all layers, and the module that it comes from."""
    if held.node in gradients:
        return "gradients of parameters", ""
    call = source_of(held.node)
    path = module_path(call) or _forward_path(call)
    where = re.sub(r"\.\d+(?=\.|$)", ".*", path)
    return re.sub(r"_\d+$", "", call.name), where


def _forward_path(node: fx.Node) -> str:
    """Of a backward node the module whose gradient it computes."""
    stack = node.meta.get("fwd_nn_module_stack")
    path = list(stack.values())[-1][0] if stack else ""
    return clean_path(path) if isinstance(path, str) else ""
