"""Masks that cross a graph break, as vectors (:mod:`mst_fx.masks.tensor`).

In the graph that makes a mask, before the passes::

    mask = (k <= q) & padding; return mask, cos, sin                       # [B, 1, S, S]

After; the backend puts a deferred mask in its place::

    return clone(k), cos, sin, clone(q), clone(padding), table, starts     # ``mask_reach`` of them: once a step

In the graphs that read it the mask is an input. Its vectors come instead, and the mask is built from them
where it was given, so that it is like any other for the attention pass::

    k, q, padding, table, starts = inputs; mask = (k[:, None, None] <= q[:, None, :, None]) & padding[:, None, None]

Not taken out: masks whose formula is not understood, what is no larger than a chunk of queries, and what the
function that was given to ``torch.compile`` returns to its caller.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from mst_fx.chunk_rows import queries_a_chunk
from mst_fx.errors import Refusal, defect
from mst_fx.graph.edit import add_call, copy_tree, eliminate_dead_code
from mst_fx.graph.fill import call, fake_mode_of
from mst_fx.graph.levels import Level, placeholders_of
from mst_fx.graph.names import module_path
from mst_fx.graph.sizes import expression, hint
from mst_fx.graph.values import VALUE, storage_key, tensor_value, value
from mst_fx.graph.writes import mutated_storages, writes_in_place
from mst_fx.masks import formula
from mst_fx.masks.boolean import where_of
from mst_fx.masks.formula import And, Compare, Constant, Holds, Mask, Not, Or
from mst_fx.masks.read import Read, as_vector, read_mask
from mst_fx.masks.tensor import DeferredMask, MaskForm, MaskOutput, put_masks
from mst_fx.masks.understand import GIVEN, Given
from mst_fx.masks.words import form_name
from mst_fx.options import Options
from mst_fx.report import Rewrite
from mst_fx.torch_api.dynamo import copy_ending, goes_on
from mst_fx.torch_api.fakes import mode_of, real_tensors

log = logging.getLogger("mst_fx")


@dataclasses.dataclass(frozen=True)
class Crossing:
    """A graph whose masks come and go as vectors.

    Attributes:
        gm: the very graph that was given if no mask crosses its borders.
        inputs: what ``gm`` is called with.
        opened: of each argument of the old graph what is given instead: a function of it.
        masks: outputs to be put into their places.
        outputs: how many outputs the graph had.
        rewrites: for the report.
    """

    gm: fx.GraphModule
    inputs: Sequence[Any]
    opened: tuple[Callable[[Any], Sequence[Any]] | None, ...] = ()
    masks: tuple[MaskOutput, ...] = ()
    outputs: int = 0
    rewrites: tuple[Rewrite, ...] = ()

    def put_masks(self, function: Callable[..., Any], has_more: bool) -> Callable[..., Any]:
        """Wraps the compiled graph.

        Args:
            has_more: a later wrapper needs the outputs after those of the old graph, and drops them.
        """
        return put_masks(function, self.masks, None if has_more else self.outputs)

    def open_masks(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Wraps what takes the arguments of ``gm``: it takes those of the old graph."""
        opened = self.opened
        if not any(opened):
            return function

        def run(*args: Any) -> Any:
            new: list[Any] = []
            for argument, opens in zip(args, opened, strict=True):
                new += [argument] if opens is None else opens(argument)
            return function(*new)

        return run


def cross_masks(gm: fx.GraphModule, example_inputs: Sequence[Any], options: Options) -> Crossing:
    """Opens the masks that a graph is given, and takes those out that others will be.

    A defect of ours leaves the graph as it was: deferred masks are tensors to any compiler.
    """
    try:
        return _cross(gm, example_inputs, options)
    except Exception as error:
        if options.strict:
            raise
        defect("left the masks of a graph as they were", error)
        return Crossing(gm, example_inputs)


def _cross(gm: fx.GraphModule, example_inputs: Sequence[Any], options: Options) -> Crossing:
    has_inputs = any(isinstance(value(node), DeferredMask) for node in placeholders_of(gm))
    found = _candidates(gm, options)
    if not has_inputs and not found:
        return Crossing(gm, example_inputs)
    new = copy_tree(gm)
    copy_ending(gm, new)  # the doctor asks for it
    inputs, opened = _open_inputs(new, example_inputs)
    outputs = new.graph.output_node().args[0]
    masks, rewrites = _take_out(new, options)
    eliminate_dead_code(new.graph)
    new.graph.lint()
    new.recompile()
    return Crossing(new, inputs, opened, masks, len(outputs), rewrites)  # type: ignore[arg-type]


# Inputs


def _open_inputs(
    gm: fx.GraphModule, example_inputs: Sequence[Any]
) -> tuple[list[Any], tuple[Callable[[Any], Sequence[Any]] | None, ...]]:
    inputs: list[Any] = []
    opened: list[Callable[[Any], Sequence[Any]] | None] = []
    given: list[Given] = []
    before = _behind_inputs(gm)
    for node, example in zip(placeholders_of(gm), example_inputs, strict=True):
        mask = value(node)
        if not isinstance(mask, DeferredMask):
            inputs.append(example)
            opened.append(None)
            continue
        sizes = None if mask._form is None or _is_written(gm, node) else _size_nodes(gm, mask.shape, before)
        if sizes is None:
            inputs.append(_replace_by_values(gm, node))
            opened.append(lambda argument: [argument.made])
            continue
        assert mask._form is not None
        names = mask._form.vectors
        inputs += [getattr(mask, name) for name in names]
        opened.append(functools.partial(_vectors_of, names))
        given.append(_replace_by_vectors(node, mask._form, sizes, before))
    if given:
        gm.meta[GIVEN] = given
    return inputs, tuple(opened)


def _vectors_of(names: Sequence[str], mask: DeferredMask) -> list[Tensor]:
    return [getattr(mask, name) for name in names]


def _replace_by_values(gm: fx.GraphModule, node: fx.Node) -> Tensor:
    """The graph gets the mask as an ordinary tensor; returns its fake."""
    mask = value(node)
    first = mask.made if mask._form is None else getattr(mask, mask._form.vectors[0])
    with mode_of(first):
        fake = torch.empty(mask.shape, dtype=mask.dtype, device=mask.device)
    node.meta[VALUE] = fake
    return fake


def _replace_by_vectors(node: fx.Node, form: MaskForm, sizes: Sequence[Any], before: fx.Node) -> Given:
    """The graph gets the vectors of a mask, and builds it."""
    graph, mask = node.graph, value(node)
    vectors: dict[str, fx.Node] = {}
    with graph.inserting_before(node):
        for name in form.vectors:
            vectors[name] = graph.placeholder(f"{node.target}_{name}")
            vectors[name].meta[VALUE] = getattr(mask, name)
    whole = slice(None)
    mode = fake_mode_of([value(vectors[form.vectors[0]])])
    assert mode is not None
    with graph.inserting_before(before), mode:
        wide = {
            name: add_call(
                graph,
                operator.getitem,
                vectors[name],
                (whole, None, None, whole) if name[0] == "k" else (whole, None, whole, None),
            )
            for name in form.vectors
            if name not in ("table", "starts")
        }
        built = _built(graph, form.formula, wide, mask.device)
        built = add_call(graph, "reshape" if mask.ndim == 2 else "expand", built, *sizes)
        if form.dtype != torch.bool:
            kinds = {"dtype": form.dtype, "device": mask.device}
            numbers = [add_call(graph, torch.full, (), number, **kinds) for number in (0.0, form.fill)]
            built = add_call(graph, torch.where, built, *numbers)
    node.replace_all_uses_with(built)
    graph.erase_node(node)
    return Given(
        form.formula,
        form.fill not in (0.0, float("-inf")),
        tuple(wide[name].name for name in form.vectors if name in wide),
        form.chunk,
        form.table,
        tuple(vectors[name].name for name in ("table", "starts") if name in vectors),
    )


def _built(graph: fx.Graph, mask: Mask, vectors: dict[str, fx.Node], device: torch.device) -> fx.Node:
    """Nodes that compute a formula."""
    match mask:
        case Constant(found):
            return add_call(graph, torch.full, (1, 1, 1, 1), found, dtype=torch.bool, device=device)
        case Holds(vector):
            return vectors[vector]
        case Not(part):
            return add_call(graph, torch.logical_not, _built(graph, part, vectors, device))
        case Compare(op, left, right, offset):
            other: Any = offset
            if right:
                other = add_call(graph, operator.add, vectors[right], offset) if offset else vectors[right]
            return add_call(graph, formula.COMPARE[op], vectors[left] if left else 0, other)
        case And(parts) | Or(parts):
            target = operator.and_ if isinstance(mask, And) else operator.or_
            nodes = [_built(graph, part, vectors, device) for part in parts]
            return functools.reduce(lambda a, b: add_call(graph, target, a, b), nodes)
    raise AssertionError(mask)


def _behind_inputs(gm: fx.GraphModule) -> fx.Node:
    """The first node that reads inputs."""
    return next(node for node in gm.graph.nodes if node.op != "placeholder")


def _size_nodes(gm: fx.GraphModule, shape: Sequence[Any], before: fx.Node) -> list[Any] | None:
    """Ints, or nodes of the sizes that are dynamic; None if an input that has one is missing."""
    found = [size if isinstance(size, int) else _size_node(gm, size, before) for size in shape]
    return None if None in found else found


def _size_node(gm: fx.GraphModule, size: torch.SymInt, before: fx.Node) -> fx.Node | None:
    """A node with the value of a dynamic size."""
    placeholders = placeholders_of(gm)
    for node in placeholders:
        known = value(node)
        if isinstance(known, torch.SymInt) and expression(known) == expression(size):
            return node
    for node in placeholders:
        fake = value(node)
        if not isinstance(fake, Tensor) or isinstance(fake, DeferredMask):
            continue
        for dim, other in enumerate(fake.shape):
            if expression(other) == expression(size):
                with gm.graph.inserting_before(before):
                    return add_call(gm.graph, "size", node, dim)
    return None


def _is_written(gm: fx.GraphModule, mask: fx.Node) -> bool:
    """Whether the graph may write to a mask that it is given, or to a view of it.

    Dynamo's values do not tell: views of a deferred mask share no storage with it. So the graph runs once
    more, on a fake of an ordinary mask.
    """
    readers = {mask}
    for node in gm.graph.nodes:
        if any(operand in readers for operand in node.all_input_nodes):
            readers.add(node)
    calls = [node for node in readers if node.op in ("call_function", "call_method")]
    writers = {node for node in calls if writes_in_place(node)}
    if not any(operand in readers for node in writers for operand in node.all_input_nodes):
        return False
    order = [node for node in gm.graph.nodes if node in readers and node is not mask and node.op != "output"]
    return _write_to(mask, order, writers)


def _write_to(mask: fx.Node, readers: Sequence[fx.Node], writers: set[fx.Node]) -> bool:
    """Whether a writer is given the storage of the mask, in a run of what reads it, in order."""
    deferred = value(mask)
    assert deferred._form is not None
    with mode_of(getattr(deferred, deferred._form.vectors[0])):
        env: dict[fx.Node, Any] = {mask: torch.empty(mask.meta[VALUE].shape, dtype=deferred.dtype)}
    storage = storage_key(env[mask])
    for node in readers:
        operands = [env.get(operand, value(operand)) for operand in node.all_input_nodes]
        tensors = [x for x in operands if isinstance(x, Tensor) and not isinstance(x, DeferredMask)]
        if node in writers and any(storage_key(x) in (storage, None) for x in tensors):
            return True
        try:
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: env.get(n, value(n)))
            env[node] = call(node.op, node.target, args, kwargs)
        except Exception:  # a sub-graph, or what fakes cannot do: nobody knows
            return True
    return False


# Outputs


def _candidates(gm: fx.GraphModule, options: Options) -> list[fx.Node]:
    """Outputs of the size and kind of an attention mask, in a graph whose caller goes on to other graphs."""
    if "attention" not in options.passes:
        return []
    results = gm.graph.output_node().args[0]
    if not isinstance(results, (tuple, list)):
        return []
    nodes = list(dict.fromkeys(node for node in results if isinstance(node, fx.Node)))
    found = [node for node in nodes if _may_be_mask(node, options)]
    if not found or not goes_on(gm):
        return []
    storages = [storage_key(fake) for n in nodes if (fake := _plain(n)) is not None]
    # Two outputs of one storage stay so.
    return [node for node in found if storages.count(storage_key(_plain(node))) == 1]  # type: ignore[arg-type]


def _plain(node: fx.Node) -> Tensor | None:
    fake = tensor_value(node)
    return None if isinstance(fake, DeferredMask) else fake


def _may_be_mask(node: fx.Node, options: Options) -> bool:
    fake = _plain(node)
    if fake is None or node.op not in ("call_function", "call_method") or fake.requires_grad:
        return False
    is_shaped = fake.ndim == 2 or (fake.ndim == 4 and isinstance(fake.shape[1], int) and fake.shape[1] == 1)
    if not is_shaped or not (fake.dtype == torch.bool or fake.is_floating_point()):
        return False
    least = queries_a_chunk(fake.device.type, options.attention_chunk_rows)
    return min(hint(fake.shape[-2]), hint(fake.shape[-1])) > least


def _take_out(gm: fx.GraphModule, options: Options) -> tuple[tuple[MaskOutput, ...], tuple[Rewrite, ...]]:
    masks, rewrites = [], []
    mutated = mutated_storages(gm.graph)
    for node in _candidates(gm, options):
        try:
            output, rewrite = _take(gm, node, options, mutated)
        except Refusal as refusal:
            log.debug("the output %s stays: %s", node.name, refusal)
            continue
        masks.append(output)
        rewrites.append(rewrite)
    return tuple(masks), tuple(rewrites)


def _take(
    gm: fx.GraphModule, node: fx.Node, options: Options, mutated: set[int]
) -> tuple[MaskOutput, Rewrite]:
    """Takes one mask out.

    Raises:
        Refusal: if it is not understood.
    """
    fake = tensor_value(node)
    assert fake is not None
    queries, keys = fake.shape[-2:]
    chunk = queries_a_chunk(fake.device.type, options.attention_chunk_rows)
    read = read_mask(node, Level(gm), queries, keys, mutated)
    if not read.keys and not read.queries:
        raise Refusal(f"{node.name}: the mask has no vectors")
    sizes = [size if isinstance(size, int) else _size_output(gm, size) for size in fake.shape]
    table = read.table(queries, keys, chunk)
    known = tuple(table.flatten().tolist()) if table is not None else ()
    form = MaskForm(read.formula, fake.dtype, _fill(node, read.fill), chunk, known, table is None)
    new = _vector_outputs(gm, form, read, (queries, keys))
    output = gm.graph.output_node()
    results = list(output.args[0])  # type: ignore[arg-type]
    positions = tuple(index for index, result in enumerate(results) if result is node)
    for position in positions:
        results[position] = new[0]
    first = len(results)
    results += new[1:]
    places = (positions[0], *range(first, len(results)))
    size: list[Any] = []
    for found in sizes:
        size.append(found if isinstance(found, int) else (len(results),))
        results += [] if isinstance(found, int) else [found]
    output.args = (tuple(results),)
    return MaskOutput(positions, form, places, tuple(size)), _rewrite(node, read, table, queries)


def _size_output(gm: fx.GraphModule, size: torch.SymInt) -> fx.Node:
    found = _size_node(gm, size, _behind_inputs(gm))
    if found is None:
        raise Refusal(f"no input has the dynamic size {size}")
    return found


def _fill(node: fx.Node, added: float) -> float:
    """What the mask has where its formula is false, in its own type."""
    fake, made = tensor_value(node), tensor_value(where_of(node, None))
    assert fake is not None and made is not None
    if fake.dtype == torch.bool:
        return 0.0
    number = float("-inf") if added == 0.0 else added
    with real_tensors():
        return float(torch.tensor(number, dtype=made.dtype).to(fake.dtype))


def _vector_outputs(gm: fx.GraphModule, form: MaskForm, read: Read, sizes: tuple[Any, Any]) -> list[fx.Node]:
    """Copies of the vectors (inputs may be among them), and the reach of the mask if it is not known yet."""
    graph = gm.graph

    def add(target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        return add_call(graph, target, *args, **kwargs)

    with graph.inserting_before(graph.output_node()):
        keys = [as_vector(node, True, add) for node in read.keys]
        queries = [as_vector(node, False, add) for node in read.queries]
        found = [add(torch.clone, x, memory_format=torch.contiguous_format) for x in (*keys, *queries)]
        if form.has_reach:
            both = [size if isinstance(size, int) else _size_output(gm, size) for size in sizes]
            masks = [formula.text(form.formula)]
            op = torch.ops.mst_fx.mask_reach.default
            node = add(op, keys, queries, masks, *both, form.chunk, [read.is_finite])
            found += [add(operator.getitem, node, index) for index in range(2)]
    return found


def _rewrite(node: fx.Node, read: Read, table: Tensor | None, queries: Any) -> Rewrite:
    fake = tensor_value(node)
    assert fake is not None
    rows, nbytes = hint(queries), hint(fake.numel()) * fake.element_size()
    is_static = isinstance(queries, int)
    return Rewrite(
        kind="mask",
        name=module_path(node) or node.name,
        rows=rows,
        chunk_rows=rows,
        chunks=1,
        intermediate_bytes=nbytes,
        chunk_bytes=0,
        gradient="none",
        deferred=True,
        body="",
        why=f"other graphs read the mask {formula.describe(read.formula)}",
        before=(node.format_node() or node.name,),
        form=form_name(read.formula, table, read.vectors if is_static else None, rows),
    )
