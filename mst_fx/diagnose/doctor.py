"""Why little was saved, and what to do about it.

Each check looks at a report (with the facts of its graphs) and returns what it found, or nothing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from mst_fx.diagnose.findings import Diagnosis, Facts, Finding
from mst_fx.errors import Cause
from mst_fx.report import Refused, human_bytes
from mst_fx.switch import NAME, is_off
from mst_fx.torch_api.dynamo import Ending

Check = Callable[[Diagnosis], Finding | None]

_IN_PLACE = 'model.compile(backend="mst") compiles in place: whoever calls the model calls the compiled one'


def advise(report: Diagnosis) -> list[Finding]:
    """What the checks find, the widest cause first."""
    return [finding for check in CHECKS if (finding := check(report)) is not None]


def said_of(ending: Ending) -> str:
    """Where a graph breaks, and why."""
    return f"{ending.place or 'a place unknown'} ({ending.reason})"


def eager_checkpoint(report: Diagnosis) -> Finding | None:
    """Checkpointed layers that Dynamo gave up, and runs eagerly: they may be all of the model."""
    if not report.eager_checkpoints:
        return None
    said = "; ".join(report.eager_checkpoints[:3])
    return Finding(
        "eager-checkpoint",
        f"the graph breaks inside of a checkpointed layer, at {said}: Dynamo runs the whole layer eagerly, and nothing "
        "in it is rewritten",
        "take what breaks the graph (a print, an .item(), a disabled function) out of the layers that are checkpointed; "
        "fullgraph=True shows each such place",
    )


def _nothing_compiled(report: Diagnosis) -> Finding | None:
    if report.graphs or report.eager_checkpoints:
        return None
    if is_off():
        return Finding(
            "switched-off",
            f"{NAME}=0 is set: every graph goes to its compiler as it is",
            f"{NAME}=1, or none",
        )
    wrapped = ", ".join(report.uncalled)
    evidence = "no graph reached mst: what ran was not compiled"
    if wrapped:
        evidence += (
            f"; torch.compile has wrapped {wrapped}, and the module inside was called (trainers unwrap)"
        )
    return Finding("nothing-compiled", evidence, _IN_PLACE)


def _split_by_ddp(report: Diagnosis) -> Finding | None:
    split = [facts for facts in report.facts if _is_ddp(facts)]
    if not split:
        return None
    return Finding(
        "split-by-ddp",
        f"DistributedDataParallel's optimizer has cut a graph into {len(split)}, by buckets of gradients: the parts "
        "of an MLP can land in different graphs",
        "torch._dynamo.config.optimize_ddp = False before the first step",
    )


def _loss_behind_a_break(report: Diagnosis) -> Finding | None:
    heads = [f for f in report.facts if f.has_head and not f.has_loss and f.ended and not _is_ddp(f)]
    losses = [f for f in report.facts if f.has_loss and not f.has_head and f.takes_rows]
    return _behind_a_break(heads[-1]) if heads and losses else None


def _behind_a_break(head: Facts) -> Finding:
    return Finding(
        "loss-behind-a-break",
        f"Dynamo breaks the graph between the head and its loss, at {head.ended_at}: all logits are made there",
        'model.loss_type = "ForCausalLM" before compiling, for models of transformers (their fallback to it is '
        "announced by a warning that cannot be traced); else take what breaks the graph out of the way",
    )


def _graph_break(report: Diagnosis) -> Finding | None:
    """Breaks that cost something, and that nothing else explains."""
    places = {f.ended_at: f.ended for f in report.facts if f.ended_by in ("break", "data")}
    places = {at: why for at, why in places.items() if f"{at} ({why})" not in report.eager_checkpoints}
    costly = (Cause.BREAK, Cause.MASK_INPUT, Cause.IS_OUTPUT)
    is_costly = any(r.cause in costly for r in report.refusals) or not (report.rewrites or report.fits)
    if not places or not is_costly or _loss_behind_a_break(report) or _eager_experts(report):
        return None
    count = sum(f.ended_by in ("break", "data") for f in report.facts)
    said = "; ".join(f"{place} ({reason})" for place, reason in list(places.items())[:3])
    return Finding(
        "graph-break",
        f"Dynamo broke the graph {count} time(s), at {said}: nothing that spans a break is rewritten",
        "take what breaks the graph out of the way (fullgraph=True makes Dynamo say where and why), or compile what "
        "lies between the breaks",
    )


def _whole_heads(report: Diagnosis) -> list[Facts]:
    """The graphs that have the head with its loss, or that of a model compiled as a whole."""
    is_broken = any(f.ended for f in report.facts)
    return [f for f in report.facts if f.has_loss or (f.has_head and (is_broken or not f.takes_rows))]


def _head_not_compiled(report: Diagnosis) -> Finding | None:
    """Layers compiled one by one; the head too perhaps, and then its graph starts with hidden rows."""
    if "mlp" not in report.kinds() or _whole_heads(report) or not any(f.takes_rows for f in report.facts):
        return None
    skipped = next((f for f in report.facts if f.skipped_at), None)
    if skipped is not None and not skipped.trainer:
        return _function_skipped(skipped)
    heads = [f.caller_head for f in report.facts if f.caller_head]
    apart = [f for f in report.facts if f.has_head and f.takes_rows]
    if not (heads or apart) or any(f.trainer for f in report.facts):
        return None
    name = heads[0] if heads else "the vocabulary head"
    return Finding(
        "head-not-compiled",
        f"layers were compiled, and no graph has {name} with its loss: the logits are made for eager code",
        'compile the whole model (model.compile(backend="mst")) and give it its labels; or compile a function of '
        "head and loss too",
    )


def _function_skipped(facts: Facts) -> Finding:
    return Finding(
        "head-not-compiled",
        f"Dynamo has skipped the function at {facts.skipped_at}, as it does where a loop breaks the graph (a hook of FSDP2 "
        f"does): {facts.caller_head} and its loss run eagerly, and all logits are made",
        "put the head and its loss into a module of their own, or the loop over the layers: Dynamo compiles their "
        "forward functions apart",
    )


def _head_by_trainer(report: Diagnosis) -> Finding | None:
    trainers = [f.trainer for f in report.facts if f.trainer]
    if not trainers or _whole_heads(report):
        return None
    return Finding(
        "head-by-trainer",
        f"{trainers[0].upper()} has put a forward function of its own into the model, which computes the head and its "
        "loss in tiles",
        "nothing to do: what is before the head is compiled, and the trainer bounds the logits itself",
    )


def _loss_not_compiled(report: Diagnosis) -> Finding | None:
    heads = [r.name for r in _heads_of_outputs(report)]
    is_other = _split_by_ddp(report) or _head_not_compiled(report)
    if not heads or any(f.has_loss for f in report.facts) or is_other:
        return None
    return Finding(
        "loss-not-compiled",
        f"{heads[0]}'s logits leave the graph, and no graph has their loss",
        "give the labels to the model, or compile the function that computes the loss; for inference "
        'logits_to_keep=1 where the model has it, or the option logits="defer"',
    )


def _mask_outside(report: Diagnosis) -> Finding | None:
    found = [r for r in report.refusals if r.cause is Cause.MASK_INPUT]
    if not found:
        return None
    evidence = f"the mask of {found[0].name} ({len(found)} such place(s)) is an input of the graph: S x S elements are made "
    own = (
        "give the model a padding mask [B, S] or none (is_causal=True in attention of your own), or make the mask inside "
        "of the compiled function, by comparing vectors: positions, or the number of each token's document"
    )
    if not any(
        f.takes_rows or f.ended_by for f in report.facts
    ):  # nothing runs before the graph that could make it
        return Finding("mask-given", f"{evidence}by the caller, who gives it to the compiled function", own)
    return Finding(
        "mask-outside",
        f"{evidence}outside of it, where nothing is rewritten",
        "compile the whole model in one graph, so that the mask is made in it; or compile its layers alone "
        "(layer.compile), to which transformers passes no mask where causal attention needs none, and head and loss as "
        f"one function. If the mask is your own: {own}",
    )


def _logits_kept(report: Diagnosis) -> Finding | None:
    heads = _heads_of_outputs(report)
    if not heads or not any(f.has_head and f.has_loss for f in report.facts) or _split_by_ddp(report):
        return None
    return Finding(
        "logits-kept",
        f"{heads[0].name}'s logits and their loss are in one graph, and the logits have to be made as an output",
        'the option logits="auto", or "defer": they are computed on first use',
    )


def _logits_used(report: Diagnosis) -> Finding | None:
    if not report.logits_used:
        return None
    return Finding(
        "logits-used",
        f"deferred logits were computed in full because of {', '.join(report.logits_used)}",
        "read the loss alone, or slice the rows that are needed first; for the Trainer's evaluation "
        "prediction_loss_only=True",
    )


def _eager_experts(report: Diagnosis) -> Finding | None:
    places = [f.ended_at for f in report.facts if f.ended_by == "data" and f.routes]
    if not places:
        return None
    return Finding(
        "eager-experts",
        f"tokens are picked for each expert, so that data decide the shape of a value ({places[-1]}): the graph breaks "
        "in every such layer",
        'for models of transformers experts_implementation="grouped_mm" in the config: the layer becomes part of '
        "one graph, with its head, loss and attention, and experts run in chunks of slots",
    )


def _grouped_experts(report: Diagnosis) -> Finding | None:
    names = [r.name for r in report.refusals if r.cause is Cause.EXPERTS]
    if not names:
        return None
    return Finding(
        "experts-not-chunked",
        f"{len(names)} layer(s) of experts, as {names[0]}, are left as they were: rows are grouped by expert",
        "nothing to do in the model; gradient checkpointing bounds what experts keep to one layer",
    )


def _one_chunk(report: Diagnosis) -> Finding | None:
    if not report.fits or any(r.kind in ("mlp", "vocab") for r in report.rewrites):
        return None
    fit = report.fits[0]
    return Finding(
        "short",
        f"{fit.rows:,} rows fit in one chunk of {fit.chunk_rows:,} ({fit.name}; {len(report.fits)} such places)",
        "longer sequences or batches are what mst is for; smaller chunks (the options chunk_rows, vocab_chunk_rows) "
        "save memory here too, and may cost time",
    )


def _sharded(report: Diagnosis) -> Finding | None:
    count = sum(facts.dtensors for facts in report.facts)
    if not count:
        return None
    return Finding(
        "sharded-weights",
        f"{count} weight(s) are DTensors (tensor parallelism): what they multiply is not proved row-wise",
        "FSDP2 instead: inside of its graphs the weights are plain tensors; places without DTensors are rewritten "
        "all the same",
    )


def _heads_of_outputs(report: Diagnosis) -> list[Refused]:
    """The heads that were refused because their logits are an output."""
    return [r for r in report.refusals if r.kind == "vocab" and r.cause is Cause.IS_OUTPUT]


def _is_ddp(facts: Facts) -> bool:
    return facts.ended_by == "ddp"


# What explains most comes first.
CHECKS: tuple[Check, ...] = (
    eager_checkpoint,
    _nothing_compiled,
    _split_by_ddp,
    _eager_experts,
    _loss_behind_a_break,
    _graph_break,
    _head_not_compiled,
    _head_by_trainer,
    _loss_not_compiled,
    _logits_kept,
    _logits_used,
    _mask_outside,
    _sharded,
    _grouped_experts,
    _one_chunk,
)


# What is said to everybody (:mod:`mst_fx.diagnose.warn`), of the report of one graph, if it costs at least so many bytes.

CostlyCheck = Callable[[Diagnosis, int], Finding | None]


def _costs_of(report: Diagnosis, kind: str, causes: tuple[Cause, ...]) -> int:
    return sum(r.kept_bytes for r in report.refusals if r.kind in kind and r.cause in causes)


def _costly_split(report: Diagnosis, least: int) -> Finding | None:
    torn = _costs_of(report, "mlp vocab", (Cause.BREAK, Cause.IS_OUTPUT)) >= least
    return _split_by_ddp(report) if torn else None


def _costly_break(report: Diagnosis, least: int) -> Finding | None:
    (facts,) = report.facts
    is_costly = facts.ended and not _is_ddp(facts) and _costs_of(report, "vocab", (Cause.BREAK,)) >= least
    return _behind_a_break(facts) if is_costly else None


def _costly_loss(report: Diagnosis, least: int) -> Finding | None:
    found = _loss_not_compiled(report)
    cost = _costs_of(report, "vocab", (Cause.IS_OUTPUT,))
    if found is None or cost < least or report.facts[0].trainer:
        return None
    evidence = f"{found.evidence}: {human_bytes(cost)} of them, and as much again for each step of the loss"
    return dataclasses.replace(found, evidence=evidence)


def _costly_head(report: Diagnosis, least: int) -> Finding | None:
    (facts,) = report.facts
    rows = max((r.rows for r in report.rewrites if r.kind == "mlp"), default=0)
    return _head_not_compiled(report) if 4 * rows * facts.caller_width >= least else None


def _costly_refusal(report: Diagnosis, least: int) -> Finding | None:
    heads = [
        r for r in report.refusals if r.kind == "vocab" and r.cause not in (Cause.IS_OUTPUT, Cause.BREAK)
    ]
    if any(r.kind == "vocab" for r in report.rewrites) or sum(r.kept_bytes for r in heads) < least:
        return None
    return Finding(
        "head-refused",
        f"{heads[0].name} has its loss in the graph, and is left as it was: {heads[0].reason}",
        "write it so that each row's loss depends on this row alone; mst-fx explain shows all refusals",
    )


def _costly_mask(report: Diagnosis, least: int) -> Finding | None:
    return _mask_outside(report)  # of more queries than a chunk has, else there is no refusal


COSTLY: tuple[CostlyCheck, ...] = (
    _costly_split,
    _costly_break,
    _costly_loss,
    _costly_head,
    _costly_refusal,
    _costly_mask,
)
