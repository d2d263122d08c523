"""The program: every rewrite of a graph, in order. Runs them over a graph, and keeps what they did in a report."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Sequence
from typing import Any

from torch import fx

from mst_fx.bodies.body import Body, BodyConfig
from mst_fx.chunking_experts import with_rows_of_rank
from mst_fx.context import Shared
from mst_fx.errors import Cause, GroupError, defect
from mst_fx.graph.edit import copy_tree
from mst_fx.listeners import on_graph
from mst_fx.logits.put_back import TakenLogits, arguments_of, with_logits
from mst_fx.options import PASS_NAMES, Options, make_options
from mst_fx.passes import (
    attention,
    averages,
    buffers,
    casts,
    dead_code,
    defer_logits,
    dropouts,
    einsums,
    embeddings,
    exchange_again,
    experts,
    functional,
    gathered_rows,
    heads,
    inline,
    memory_plan,
    mlp,
    one_hots,
    overlap,
    picks,
    positional,
    repeated_rows,
    routing,
    row_outputs,
    row_slices,
    scalars,
    sequence,
    stacks,
    sum_losses,
    triangles,
    values,
    vocab,
)
from mst_fx.passes.mask_breaks import Crossing
from mst_fx.process import one_thread
from mst_fx.report import Refused, Report
from mst_fx.runner import Runner
from mst_fx.stage import Helper, Scope, Stage, When, check_order
from mst_fx.torch_api.autograd import without_saved_tensors_hooks
from mst_fx.torch_api.dynamo import ending_of, until_reset
from mst_fx.torch_api.graphs import make_code
from mst_fx.torch_api.inductor import mode_patches

log = logging.getLogger("mst_fx")

# Helpers of several stages.
_FUNCTIONAL = Helper("functional", functional.run, gives=frozenset({"no-writes"}))
_ROW_SLICES = Helper(
    "row_slices", row_slices.run, needs=frozenset({"no-writes"}), gives=frozenset({"clones"})
)

# All that changes a captured graph, in this order.
STAGES: tuple[Stage, ...] = (
    # The program made ready, in the copy that all others work on.
    Stage("inline", inline.run, matches=inline.matches, in_place=True, gives=frozenset({"calls"})),
    Stage("values", values.run, in_place=True, needs=frozenset({"calls"}), gives=frozenset({"values"})),
    Stage("dead_code", dead_code.run, in_place=True, needs=frozenset({"values"})),
    Stage("casts", casts.run, in_place=True, needs=frozenset({"values"})),
    Stage(
        "positional",
        positional.run,
        in_place=True,
        needs=frozenset({"values"}),
        gives=frozenset({"operands"}),
    ),
    # The program with all its checkpointed layers: masks are made outside of them.
    Stage(
        "attention",
        attention.run,
        prepared_by=(
            Helper("functional", functional.run),
            Helper("triangles", triangles.run),
            Helper("einsums", einsums.run),
            Helper("heads", heads.run, gives=frozenset({"heads"})),
        ),
        needs=frozenset({"operands", "heads"}),
        gives=frozenset({"attention"}),
    ),
    # Behind attention, of which a number that changes is the cap.
    Stage(
        "numbers",
        scalars.put_in,
        matches=scalars.is_changing,
        in_place=True,
        needs=frozenset({"operands", "attention"}),
        gives=frozenset({"numbers-are-tensors"}),
    ),
    # Where a rank works on its own tokens: the only loops that are there before it knows which these are.
    Stage(
        "experts",
        experts.run,
        scope=Scope.EACH_GRAPH,
        matches=experts.matches,
        prepared_by=(_FUNCTIONAL,),
        needs=frozenset({"operands", "attention", "numbers-are-tensors"}),
        gives=frozenset({"experts"}),
    ),
    # Behind attention, whose masks are of all tokens; before loops, which are over a rank's.
    Stage(
        "sequence",
        sequence.run,
        matches=sequence.matches,
        is_vital=True,
        prepared_by=(
            _FUNCTIONAL,
            _ROW_SLICES,
            Helper("sum_losses", sum_losses.run, needs=frozenset({"clones"})),
        ),
        needs=frozenset({"operands", "attention", "numbers-are-tensors"}),
        gives=frozenset({"rows-of-a-rank"}),
    ),
    Stage(
        "mlp",
        mlp.run,
        scope=Scope.EACH_GRAPH,
        prepared_by=(
            _FUNCTIONAL,
            Helper("repeated_rows", repeated_rows.run, needs=frozenset({"no-writes"})),
            Helper("dropouts", dropouts.put_in, gives=frozenset({"seeded-dropouts"})),
        ),
        followed_by=(Helper("dropouts_back", dropouts.take_out, needs=frozenset({"seeded-dropouts"})),),
        needs=frozenset({"operands", "attention", "numbers-are-tensors"}),
        gives=frozenset({"mlps"}),
    ),
    # Behind MLPs: the head's region may not take the last layer's with it.
    Stage(
        "vocab",
        vocab.run,
        scope=Scope.EACH_GRAPH,
        matches=vocab.matches,
        prepared_by=(
            _FUNCTIONAL,
            Helper("picks", picks.run, needs=frozenset({"no-writes"}), gives=frozenset({"gathers"})),
            Helper("gathered_rows", gathered_rows.run, needs=frozenset({"gathers"})),
            Helper("one_hots", one_hots.run),
            Helper("stacks", stacks.run),
            _ROW_SLICES,
            Helper(
                "sum_losses",
                sum_losses.run,
                needs=frozenset({"clones"}),
                gives=frozenset({"losses-are-sums"}),
            ),
        ),
        needs=frozenset({"mlps", "losses-are-sums", "clones"}),
        gives=frozenset({"logits-to-defer"}),
    ),
    Stage(
        "defer_logits",
        defer_logits.run,
        matches=defer_logits.matches,
        only_if_changed=True,
        in_place=True,
        needs=frozenset({"logits-to-defer"}),
        gives=frozenset({"logits-deferred"}),
    ),
    # Behind logits that are deferred, which are made of a rank's rows.
    Stage(
        "row_outputs",
        row_outputs.run,
        matches=row_outputs.matches,
        in_place=True,
        needs=frozenset({"rows-of-a-rank", "logits-deferred"}),
    ),
    # Behind logits that are deferred, which take numbers with them as the tensors that they are in loops.
    Stage(
        "numbers_back",
        scalars.take_out,
        matches=scalars.has_numbers,
        only_if_changed=True,
        needs=frozenset({"numbers-are-tensors", "logits-deferred"}),
    ),
    # For Inductor's sake, and worth nothing to a program that stays as it was.
    Stage(
        "embeddings",
        embeddings.run,
        scope=Scope.TOP,
        matches=embeddings.matches,
        only_if_changed=True,
        needs=frozenset({"operands"}),
    ),
    Stage(
        "buffers",
        buffers.run,
        scope=Scope.TOP,
        matches=buffers.matches,
        only_if_changed=True,
        needs=frozenset({"attention"}),
    ),
)

# All that changes the graph of forward and backward pass.
JOINT_STAGES: tuple[Stage, ...] = (
    # Before the plan, which keeps what is marked.
    Stage("routing", routing.run, when=When.JOINT, wanted=routing.is_wanted, is_cacheable=True),
    Stage("memory", memory_plan.run, when=When.JOINT, wanted=memory_plan.is_wanted),
    # Behind the plan, which says what is made again.
    Stage("overlap", overlap.run, when=When.JOINT, wanted=overlap.is_wanted, is_cacheable=True),
    # Behind what moves exchanges to where their operands are made: its own stand beside other work.
    Stage(
        "exchange_again",
        exchange_again.run,
        when=When.JOINT,
        wanted=exchange_again.is_wanted,
        is_cacheable=True,
    ),
    # Behind all other exchanges.
    Stage(
        "averages",
        averages.run,
        when=When.JOINT,
        wanted=averages.is_wanted,
        is_cacheable=True,
        is_vital=True,
    ),
)

check_order(STAGES, When.CAPTURED, PASS_NAMES)
check_order(JOINT_STAGES, When.JOINT)


@dataclasses.dataclass
class Result:
    """A rewritten graph.

    Attributes:
        gm: the rewritten graph, or the very graph that was given if no pass rewrote anything.
        report: what was done.
        taken_logits: outputs of ``gm`` that its caller must get in another form.
        outputs: how many outputs the graph had.
        bodies: of the loops in ``gm``; whoever runs it must keep them (:func:`mst_fx.bodies.body.with_bodies_alive`).
    """

    gm: fx.GraphModule
    report: Report
    taken_logits: tuple[TakenLogits, ...] = ()
    outputs: int = 0
    bodies: tuple[Body, ...] = ()


def rewrite(
    gm: fx.GraphModule, example_inputs: Sequence[Any], options: dict[str, Any] | Options | None = None
) -> tuple[fx.GraphModule, Report]:
    """The passes alone, on any FX graph.

    Args:
        gm: from ``torch.fx.symbolic_trace``, ``torch.export.export(...).module()`` or Dynamo; weights
            may be placeholders or attributes. It is not changed.
        example_inputs: what ``gm`` is called with, real or fake.
        options: as of ``torch.compile(..., backend="mst", options=...)``.

    Returns:
        The rewritten graph (``gm`` itself if nothing was rewritten) and the report. Where logits are
        deferred, the module returns :class:`~mst_fx.logits.tensor.DeferredLogits` in their place.

    Raises:
        OptionError: for bad options.
        Refusal: with ``strict=True``, for the first refusal.
    """
    result = run_passes(gm, example_inputs, make_options(options))
    make_code(result.gm)
    if result.bodies:  # and what is compiled from the module may outlive it
        result.gm.meta["mst_fx"] = result.bodies
        until_reset().update({body.key: body for body in result.bodies})
    if result.taken_logits:
        taken_logits, outputs = result.taken_logits, result.outputs

        def put_logits(module: Any, args: Any, results: Any) -> Any:
            return with_logits(results, arguments_of(taken_logits, args), taken_logits, outputs)

        result.gm.register_forward_hook(put_logits)
    return result.gm, result.report


@one_thread()
@without_saved_tensors_hooks()  # nodes run on fakes, some of them with gradients
def run_passes(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    options: Options,
    mode: str | None = None,
    crossing: Crossing | None = None,
) -> Result:
    """:func:`rewrite` for the backend: deferred outputs are left to the caller.

    Args:
        gm: the graph as captured.
        example_inputs: of the graph that is rewritten.
        crossing: what is rewritten instead, where masks come or go as vectors.
    """
    captured, gm = gm, crossing.gm if crossing is not None else gm
    start = time.perf_counter()
    report = Report(graphs=1)
    patches = {**mode_patches(mode or options.mode), **options.inductor}
    config = BodyConfig(options.inner, options.accumulate, tuple(sorted(patches.items())))
    shared = Shared()
    try:
        runner = Runner(STAGES, options, config, example_inputs, report, shared, str(ending_of(gm)))
        new = runner.run(copy_tree(gm))
        new.recompile()
    except GroupError:
        raise
    except Exception as error:
        if options.strict or options.group is not None:  # one rank alone would go on without the others
            raise
        report = Report(
            graphs=1,
            refusals=[Refused("graph", "", defect("skipped everything for a graph", error), Cause.DEFECT)],
        )
    if not report.rewrites:
        new, shared = gm, Shared()
    elif options.group is not None:
        report.rewrites[:] = with_rows_of_rank(report.rewrites, new)
    report.rewrites[:0] = crossing.rewrites if crossing is not None else ()
    if report.rewrites:
        report.before.append(_text(captured))
        report.after.append(_text(new))
    else:
        report.before.append("")
        report.after.append("")
    report.seconds = time.perf_counter() - start
    _log(report)
    on_graph.tell(captured, new, report)
    return Result(new, report, shared.taken_logits, shared.outputs, tuple(shared.bodies.values()))


def _text(gm: fx.GraphModule) -> str:
    return gm.print_readable(print_output=False)


def _log(report: Report) -> None:
    log.info("%s (%.2f s)", report.summary(), report.seconds)
    for refused in report.refusals:
        log.info("refused %s %s: %s", refused.kind, refused.name, refused.reason)
    if log.isEnabledFor(logging.DEBUG):
        log.debug("%s\n%s", report, report.diff())
