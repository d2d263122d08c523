"""Deferred logits in the hands of real callers: values, types and gradients are those of eager logits."""

from __future__ import annotations

import copy
import dataclasses
import functools
import importlib.util
import io
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten
from torch.utils.checkpoint import checkpoint

import mst_fx
from mst_fx.logits.tensor import DeferredLogits
from tests.helpers import SMALL_CHUNKS, Exponential, ToyLM, relative_error, token_batch

VOCAB, BATCH, LENGTH = 96, 2, 33
ROWS = BATCH * LENGTH


@dataclasses.dataclass
class Given:
    """What a caller of the model has in hands: the loss, the logits ``[B, S, V]``, ids and labels ``[B, S]``."""

    loss: Tensor
    logits: Tensor
    ids: Tensor
    labels: Tensor

    @property
    def outputs(self) -> Any:
        from transformers.modeling_outputs import CausalLMOutputWithPast

        return CausalLMOutputWithPast(loss=self.loss, logits=self.logits)  # type: ignore[arg-type]

    @property
    def shifted(self) -> Tensor:
        return F.pad(self.labels, (0, 1), value=-100)[:, 1:]


@dataclasses.dataclass(frozen=True)
class Use:
    """One use of logits.

    Attributes:
        caller: who does this: package, file, function or class; :func:`place_of` finds its line.
        call: what is done; every tensor, array and number in its result is compared.
        rows: how many rows of logits may be computed; None: any number.
        dtype: of the model.
    """

    caller: str
    call: Callable[[Given], Any]
    rows: int | None = None
    dtype: torch.dtype = torch.float64

    def __str__(self) -> str:
        place = place_of(self.caller)
        return (f"{self.caller} {place}" if place else self.caller).replace(" ", "-")


@functools.cache
def place_of(caller: str) -> str:
    """Where the installed version of a library has a caller, as ``file:line``; "" if no file is named."""
    package, file, name = [*caller.split(maxsplit=2), "", ""][:3]
    spec = importlib.util.find_spec(package) if file.endswith(".py") else None
    symbol = re.match(r"\w+", name)
    if spec is None or not spec.submodule_search_locations or symbol is None:
        return ""
    root = Path(spec.submodule_search_locations[0])
    for path in (root / file, *sorted(root.glob(f"*/{file}"))):
        lines = path.read_text().splitlines() if path.exists() else []
        is_start = re.compile(rf"\s*(def|class) {symbol.group()}\b")
        for number, line in enumerate(lines, start=1):
            if is_start.match(line):
                return f"{path.relative_to(root.parent)}:{number}"
    return ""


def _trainer(name: str) -> Any:
    from transformers import trainer_pt_utils

    return getattr(trainer_pt_utils, name)


def _losses(name: str) -> Any:
    from transformers.loss import loss_utils

    return getattr(loss_utils, name)


def _warper(name: str, *args: Any, **kwargs: Any) -> Callable[[Given], Any]:
    def run(given: Given) -> Any:
        from transformers.generation import logits_process

        warper = getattr(logits_process, name)(*args, **kwargs)
        return warper(given.ids, given.logits[:, -1, :].detach())

    return run


def _accelerate(name: str) -> Any:
    return getattr(pytest.importorskip("accelerate").utils.operations, name)


def _trl(name: str) -> Any:
    return getattr(pytest.importorskip("trl.trainer.utils"), name)


class _Through(torch.autograd.Function):
    """Returns what it gets, as DDP's sink does, and changes its gradient."""

    @staticmethod
    def forward(ctx: Any, clone: bool, x: Tensor) -> Tensor:
        return x.clone() if clone else x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:
        return None, 7 * grad


def _label_smoother(given: Given, shift: bool) -> Any:
    return _trainer("LabelSmoother")(0.1)(given.outputs, given.labels, shift_labels=shift)


def _eval_loop_container(given: Given) -> Any:
    container = _trainer("EvalLoopContainer")(do_nested_concat=True, padding_index=-100)
    for _ in range(2):
        container.add(_trainer("nested_detach")((given.logits,)))
    container.to_cpu_and_numpy()
    return container.get_arrays()


def _prediction_step(given: Given) -> Any:
    outputs = given.outputs
    logits = tuple(v for k, v in outputs.items() if k not in ["past_key_values", "loss"])
    (found,) = _trainer("nested_detach")(logits)
    return found


def _preprocess(given: Given) -> Any:
    """``preprocess_logits_for_metrics`` and ``compute_metrics`` as in run_clm.py."""
    predictions = _prediction_step(given).argmax(dim=-1).numpy()
    labels = given.labels[:, 1:].reshape(-1).numpy()
    return float((predictions[:, :-1].reshape(-1) == labels).mean())


def _classification(given: Given) -> Any:
    """``GenericForSequenceClassification.forward``: the logits of each sequence's last token."""
    last = torch.tensor([7, LENGTH - 1])
    return given.logits[torch.arange(BATCH, device=given.logits.device), last]


def _assisted(given: Given) -> Any:
    new_logits = given.logits[:, -5 - 1 :].to(dtype=torch.float32, device=given.ids.device)
    probabilities = new_logits[:, :5, :].softmax(dim=-1)
    return probabilities, new_logits[:, 5:, :], tuple(new_logits[:, i, :] for i in range(6))


def _sampling_in_place(given: Given) -> Any:
    scores = given.logits[:, -1].clone()
    scores[scores < scores.topk(5).values[:, -1:]] = -1e9
    return scores, given.logits[:, -1]


def _fp32_wrapper(given: Given) -> Any:
    forward = _accelerate("convert_outputs_to_fp32")(lambda: given.outputs)
    out = forward()
    assert isinstance(out.logits, DeferredLogits) == isinstance(given.logits, DeferredLogits)
    return out.logits, out.loss


def _torch_save(given: Given) -> Any:
    buffer = io.BytesIO()
    torch.save({"logits": given.logits.detach()}, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def _ddp_flatten(given: Given) -> Any:
    from torch.nn.parallel.distributed import (
        _find_tensors,
        _tree_flatten_with_rref,
        _tree_unflatten_with_rref,
    )

    assert len(list(_find_tensors(given.outputs))) == 2
    tensors, spec, is_rref = _tree_flatten_with_rref(given.outputs)
    return _tree_unflatten_with_rref(tensors, spec, is_rref)["logits"].sum()


def _pytree(given: Given) -> Any:
    leaves, spec = tree_flatten(given.outputs)
    return tree_unflatten([leaf * 2 for leaf in leaves], spec).logits


def _checkpointed(given: Given, reentrant: bool) -> Any:
    return checkpoint(lambda x: x.exp().sum(-1), given.logits, use_reentrant=reentrant)


def _compiled(given: Given, backend: str) -> Any:
    def consumer(x: Tensor) -> Any:
        return torch.softmax(x, -1).square().sum(), x[:, -1].exp(), x.float()

    return torch.compile(consumer, backend=backend)(given.logits)


def _compiled_after_break(given: Given) -> Any:
    def consumer(x: Tensor) -> Tensor:
        last = x[:, -1]
        torch._dynamo.graph_break()
        return torch.log_softmax(last, -1) + x.mean()

    return torch.compile(consumer, backend="aot_eager")(given.logits)


def _speculative(given: Given) -> Any:
    chosen = torch.distributions.Categorical(logits=given.logits)
    return chosen.log_prob(given.ids), chosen.entropy()


def _in_place(given: Given) -> Any:
    """Temperature in place, as verl does, between other uses."""
    rows, cast = given.logits[:, 3:5], given.logits.float()
    detached = given.logits.detach()
    given.logits.div_(2)
    given.logits[:, 0] *= 3
    return rows, cast, detached, given.logits.logsumexp(-1)


def _in_place_then_kernel(given: Given) -> Any:
    """verl's ``logits.div_(temperature)``, then flash-attn's ``CrossEntropyLoss.apply``."""
    given.logits.div_(0.7)
    return Exponential.apply(given.logits)  # type: ignore[no-untyped-call]


def _selective(given: Given) -> Any:
    """Selective checkpointing counts the operators it saves; those of the logits are not its business."""
    save = torch.utils.checkpoint.CheckpointPolicy.MUST_SAVE
    recompute = torch.utils.checkpoint.CheckpointPolicy.PREFER_RECOMPUTE
    weight = torch.linspace(-1, 1, VOCAB * 3, dtype=given.logits.dtype).view(VOCAB, 3)

    def policy(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> Any:
        return save if op is torch.ops.aten.mm.default else recompute

    def consumer(logits: Tensor) -> Tensor:
        return (logits.flatten(0, 1) @ weight).exp().sin()

    contexts = functools.partial(torch.utils.checkpoint.create_selective_checkpoint_contexts, policy)
    return checkpoint(consumer, given.logits, use_reentrant=False, context_fn=contexts)


def _in_place_rows(given: Given) -> Any:
    rows = given.logits[:, 3:5]
    before = rows.sum()
    rows.mul_(5)
    return before, rows, given.logits


def _hook_on_rows(given: Given) -> Any:
    rows = given.logits[:, 3:9]
    rows.register_hook(lambda grad: grad * 3)
    return rows[:, 0].exp(), rows


def _retained(given: Given) -> Any:
    copied = given.logits.clone()
    copied.retain_grad()
    copied[:, -1].exp().sum().backward(retain_graph=True)
    return copied.grad, copied


def _leaf(given: Given) -> Any:
    leaf = given.logits.detach().requires_grad_()
    leaf[:, :-1].exp().sum().backward()
    return leaf.grad


def _gradient_of_rows(given: Given) -> Any:
    rows = given.logits[:, -3:]
    return torch.autograd.grad(rows.square().sum(), rows, retain_graph=True)


def _perplexity(given: Given) -> Any:
    """The Hugging Face guide's: shifted, flattened, contiguous."""
    shift_logits = given.logits[..., :-1, :].contiguous()
    shift_labels = given.labels[..., 1:].contiguous()
    return F.cross_entropy(shift_logits.view(-1, shift_logits.size(-1)), shift_labels.view(-1))


def _inference(given: Given) -> Any:
    with torch.inference_mode():
        best, most = given.logits[:, -1].argmax(-1), given.logits.max()
    return best.clone(), most.clone(), given.logits.logsumexp(-1)


def _no_grad(given: Given) -> Any:
    with torch.no_grad():
        rows, all_of_them = given.logits[:, -2:], given.logits * 1
    return rows, rows + 1, all_of_them, given.logits[:, -1]


def _dpo(given: Given) -> Any:
    """TRL's DPOTrainer: shifted log-probabilities, the means of the logits of chosen and rejected rows."""
    mask = given.labels[:, 1:] != -100
    shift_logits = given.logits[..., :-1, :]
    return shift_logits[mask].mean(), given.logits[:1, :-1][mask[:1]].detach().mean()


USES = (
    Use(
        "transformers trainer_pt_utils.py nested_detach",
        lambda g: _trainer("nested_detach")((g.logits, g.loss)),
    ),
    Use(
        "transformers trainer_pt_utils.py nested_numpify",
        lambda g: _trainer("nested_numpify")(g.logits.detach()),
    ),
    Use(
        "transformers trainer_pt_utils.py nested_concat",
        lambda g: _trainer("nested_concat")(g.logits, g.logits[:, :-3], padding_index=-100),
    ),
    Use(
        "transformers trainer_pt_utils.py torch_pad_and_concatenate",
        lambda g: _trainer("torch_pad_and_concatenate")(g.logits[:, -4:], g.logits[:, -2:]),
        rows=12,
    ),
    Use(
        "transformers trainer_pt_utils.py nested_truncate",
        lambda g: _trainer("nested_truncate")(g.logits, 1),
        33,
    ),
    Use(
        "transformers trainer_pt_utils.py find_batch_size",
        lambda g: _trainer("find_batch_size")(g.outputs),
        0,
    ),
    Use("transformers trainer_pt_utils.py LabelSmoother, shifted", lambda g: _label_smoother(g, True)),
    Use("transformers trainer_pt_utils.py LabelSmoother", lambda g: _label_smoother(g, False)),
    Use("transformers trainer_pt_utils.py EvalLoopContainer", _eval_loop_container),
    Use("transformers trainer.py prediction_step", _prediction_step),
    Use("transformers examples run_clm.py compute_metrics", _preprocess),
    Use(
        "transformers loss_utils.py ForCausalLMLoss",
        lambda g: _losses("ForCausalLMLoss")(g.logits, g.labels, VOCAB, num_items_in_batch=torch.tensor(50)),
    ),
    Use(
        "transformers loss_utils.py ForMaskedLMLoss",
        lambda g: _losses("ForMaskedLMLoss")(g.logits, g.labels, VOCAB),
    ),
    Use(
        "transformers loss_utils.py fixed_cross_entropy",
        lambda g: _losses("fixed_cross_entropy")(g.logits.view(-1, VOCAB), g.shifted.reshape(-1)),
    ),
    Use("transformers modeling_outputs.py CausalLMOutputWithPast[1]", lambda g: g.outputs[1] + 0),
    Use("transformers utils/generic.py to_tuple", lambda g: g.outputs.to_tuple()),
    Use(
        "transformers generation/utils.py _sample",
        lambda g: g.logits[:, -1].to(copy=True, dtype=torch.float32),
        2,
    ),
    Use("transformers generation/utils.py _assisted_decoding", _assisted, rows=24),
    Use("transformers logits_process.py TemperatureLogitsWarper", _warper("TemperatureLogitsWarper", 0.7), 2),
    Use("transformers logits_process.py TopKLogitsWarper", _warper("TopKLogitsWarper", 7), 2),
    Use("transformers logits_process.py TopPLogitsWarper", _warper("TopPLogitsWarper", 0.8), 2),
    Use("transformers logits_process.py MinPLogitsWarper", _warper("MinPLogitsWarper", 0.1), 2),
    Use(
        "transformers logits_process.py RepetitionPenaltyLogitsProcessor",
        _warper("RepetitionPenaltyLogitsProcessor", 1.2),
        rows=2,
    ),
    Use("transformers modeling_layers.py GenericForSequenceClassification", _classification, rows=2),
    Use("transformers modeling_layers.py [:, None, :]", lambda g: g.logits[:, -1, :][:, None, :], rows=2),
    Use("transformers modeling_layers.py unpadded vocabulary", lambda g: g.logits[..., :90]),
    Use("transformers docs perplexity.md", _perplexity),
    Use(
        "accelerate operations.py convert_to_fp32",
        lambda g: _accelerate("convert_to_fp32")(g.outputs).logits,
        None,
        torch.bfloat16,
    ),
    Use("accelerate operations.py convert_outputs_to_fp32", _fp32_wrapper, None, torch.bfloat16),
    Use(
        "accelerate operations.py send_to_device",
        lambda g: _accelerate("send_to_device")(g.outputs, "cpu")["logits"],
    ),
    Use("accelerate operations.py gather", lambda g: _accelerate("gather")(g.logits.detach())),
    Use(
        "accelerate operations.py pad_across_processes",
        lambda g: _accelerate("pad_across_processes")(g.logits, dim=1),
    ),
    Use(
        "accelerate operations.py slice_tensors",
        lambda g: _accelerate("slice_tensors")(g.outputs.to_tuple()[1:], slice(0, 1)),
        33,
    ),
    Use("accelerate operations.py concatenate", lambda g: _accelerate("concatenate")([g.logits, g.logits])),
    Use("accelerate operations.py reduce", lambda g: _accelerate("reduce")(g.logits)),
    Use(
        "accelerate operations.py find_batch_size",
        lambda g: _accelerate("find_batch_size")({"logits": g.logits}),
        0,
    ),
    Use(
        "accelerate operations.py get_data_structure",
        lambda g: _accelerate("get_data_structure")(g.logits).shape,
        0,
    ),
    Use("accelerate operations.py listify", lambda g: _accelerate("listify")(g.logits.detach())),
    Use(
        "trl trainer/utils.py selective_log_softmax", lambda g: _trl("selective_log_softmax")(g.logits, g.ids)
    ),
    Use(
        "trl trainer/utils.py selective_log_softmax, bf16",
        lambda g: _trl("selective_log_softmax")(g.logits[:, :-1], g.ids[:, 1:]),
        None,
        torch.bfloat16,
    ),
    Use(
        "trl trainer/utils.py entropy_from_logits",
        lambda g: _trl("entropy_from_logits")(g.logits[:, -9:], 4),
        18,
    ),
    Use("trl trainer/dpo_trainer.py compute_loss", _dpo),
    Use("trl trainer/reward_trainer.py chunk", lambda g: torch.chunk(g.logits.squeeze(-1), chunks=2)),
    Use(
        "torch nn/functional.py cross_entropy", lambda g: F.cross_entropy(g.logits.transpose(1, 2), g.labels)
    ),
    Use(
        "torch nn/functional.py log_softmax, gather",
        lambda g: F.log_softmax(g.logits, -1).gather(-1, g.ids[..., None]),
    ),
    Use(
        "torch nn/functional.py kl_div",
        lambda g: F.kl_div(g.logits.log_softmax(-1), torch.full_like(g.logits, 1 / VOCAB)),
    ),
    Use(
        "torch nn/functional.py linear",
        lambda g: F.linear(g.logits, torch.ones(3, VOCAB, dtype=g.logits.dtype)),
    ),
    Use("torch distributions Categorical", _speculative),
    Use("torch utils/checkpoint.py checkpoint", lambda g: _checkpointed(g, False)),
    Use("torch utils/checkpoint.py checkpoint, reentrant", lambda g: _checkpointed(g, True)),
    Use("torch utils/_pytree.py", _pytree),
    Use(
        "torch utils/_pytree.py tree_map detach",
        lambda g: tree_map(lambda x: x.detach(), g.outputs)["logits"],
    ),
    Use(
        "torch utils/data default_collate",
        lambda g: torch.utils.data.default_collate(list(g.logits.detach())),
    ),
    Use(
        "torch nn/utils/rnn.py pad_sequence",
        lambda g: torch.nn.utils.rnn.pad_sequence([g.logits[0], g.logits[1, :9]], True),
    ),
    Use("torch nn/parallel/distributed.py _tree_flatten_with_rref", _ddp_flatten),
    Use("torch serialization.py save", _torch_save),
    Use("torch autograd Function", lambda g: Exponential.apply(g.logits)),
    Use("torch autograd Function of rows", lambda g: Exponential.apply(g.logits[:, 3:5].float())),
    Use("torch autograd Function that returns its input", lambda g: _Through.apply(False, g.logits)),
    Use(
        "torch autograd Function that returns a clone",
        lambda g: (_Through.apply(True, g.logits)[:, :4], g.logits[0]),
    ),
    Use("torch ops aten", lambda g: torch.ops.aten._log_softmax(g.logits, -1, False)),
    Use("torch func vmap", lambda g: torch.func.vmap(lambda row: row.logsumexp(-1))(g.logits)),
    Use("torch compile, eager", lambda g: _compiled(g, "eager")),
    Use("torch compile, aot_eager", lambda g: _compiled(g, "aot_eager")),
    Use("torch compile, graph break", _compiled_after_break),
    Use("torch inference_mode", _inference),
    Use("torch no_grad", _no_grad),
    Use("torch Tensor.register_hook on rows", _hook_on_rows),
    Use("torch Tensor.retain_grad", _retained),
    Use("torch Tensor.requires_grad_ of detached", _leaf),
    Use("torch autograd.grad for rows", _gradient_of_rows),
    Use("torch Tensor.div_", _in_place),
    Use("torch Tensor.mul_ of rows", _in_place_rows),
    Use("verl torch_functional.py logprobs_from_logits_flash_attn", _in_place_then_kernel),
    Use("torch utils/checkpoint.py create_selective_checkpoint_contexts", _selective),
    Use("torch Tensor.__setitem__ of a clone", _sampling_in_place, rows=4),
    Use("torch Tensor.topk", lambda g: g.logits[:, -1].topk(5), rows=2),
    Use(
        "torch multinomial", lambda g: torch.softmax(g.logits[:, -1].float(), -1).detach().cumsum(-1), rows=2
    ),
    Use("torch Tensor.tolist", lambda g: g.logits[0, -1].tolist(), rows=1),
    Use("torch Tensor.item", lambda g: g.logits[0, -1, 3].item(), rows=1),
    Use("torch Tensor.cpu", lambda g: g.logits.cpu().detach().numpy()),
    Use("torch einsum", lambda g: torch.einsum("bsv,v->bs", g.logits, torch.arange(VOCAB).to(g.logits))),
    Use("torch stack of iteration", lambda g: torch.stack([row.exp().sum() for row in g.logits])),
    Use(
        "torch zip with labels",
        lambda g: [F.cross_entropy(x, y) for x, y in zip(g.logits, g.labels, strict=True)],
    ),
    Use(
        "torch Tensor.split",
        lambda g: [piece.logsumexp(-1) for piece in g.logits.split(10, dim=1)],
        rows=ROWS,
    ),
    Use("torch chunk", lambda g: torch.chunk(g.logits, 4, 1)[1], rows=18),
    Use("torch Tensor.unbind", lambda g: g.logits.unbind(1)[4], rows=2),
    Use("torch Tensor.narrow", lambda g: g.logits.narrow(1, 3, 4), rows=8),
    Use("torch Tensor.select", lambda g: g.logits.select(-2, -1), rows=2),
    Use("torch Tensor.index_select", lambda g: g.logits.index_select(1, torch.tensor([3, 3, 9])), rows=6),
    Use("torch Tensor[mask]", lambda g: g.logits[g.labels == g.labels[0, 5]]),
    Use("torch Tensor[rows, labels]", lambda g: g.logits[0, torch.arange(LENGTH), g.ids[0]]),
    Use("torch Tensor[list]", lambda g: g.logits[[1, 0], [2, 3]], rows=2),
    Use("torch Tensor[::4]", lambda g: g.logits[:, 1::4].bfloat16().float(), rows=16),
    Use("torch Tensor[...][...]", lambda g: g.logits[:, 4:][1:, -3:-1][0, ..., 5:9], rows=2),
    Use("torch Tensor[..., None]", lambda g: g.logits[:, -1, ..., None], rows=2),
    Use("torch cat", lambda g: torch.cat([g.logits[:, :2], g.logits[:, -2:]], 1), rows=8),
    Use("numpy asarray", lambda g: np.asarray(g.logits[:, -1].detach()), rows=2),
    Use("pickle dumps", lambda g: pickle.loads(pickle.dumps(g.logits.detach()))),
    Use("copy copy", lambda g: copy.copy(g.logits.detach())),
    Use("copy deepcopy", lambda g: copy.deepcopy(g.logits[:, -1].detach()), rows=2),
)


@functools.cache
def _models(dtype: torch.dtype) -> tuple[ToyLM, Callable[..., Any]]:
    """A model, and its rewritten graph, which runs without an outer compiler."""
    torch.manual_seed(0)
    model, inputs = ToyLM(layers=1).to(dtype), tuple(token_batch(BATCH, LENGTH).values())
    exported: Any = torch.export.export(model, inputs).module()
    rewritten, report = mst_fx.rewrite(exported, inputs, SMALL_CHUNKS)
    assert any(rewrite.deferred for rewrite in report.rewrites)
    return model, rewritten


def _leaves(result: Any) -> list[Tensor]:
    found = []
    for leaf in tree_leaves(result):
        if isinstance(leaf, (Tensor, np.ndarray, np.generic, int, float)):
            found.append(leaf if isinstance(leaf, Tensor) else torch.as_tensor(leaf))
    return found


def _outcome(
    use: Use, run: Callable[..., Any], parameters: list[Tensor]
) -> tuple[list[Tensor], list[Any], int]:
    """The results, the gradients of a weighted sum of them and of the loss, and how many rows were computed."""
    for parameter in parameters:
        parameter.grad = None
    ids, labels = token_batch(BATCH, LENGTH).values()
    loss, logits = run(ids, labels)
    rows = 0
    if isinstance(logits, DeferredLogits):
        source, compute = logits._source, logits._source._compute

        def counting(*inputs: Any) -> Tensor:
            nonlocal rows
            value = compute(*inputs)
            rows += value.numel() // VOCAB
            return value

        source._compute = counting
    results = _leaves(use.call(Given(loss, logits, ids, labels)))
    total = 3 * loss
    for result in results:
        if result.requires_grad:
            weights = torch.linspace(-1, 2, result.numel(), dtype=torch.float64).to(result.dtype)
            total = total + (result * weights.view(result.shape)).sum()
    total.backward()
    gradients = [parameter.grad for parameter in parameters]
    return [result.detach() for result in results], [r.requires_grad for r in results] + list(gradients), rows


def test_callers_are_where_they_are_said_to_be() -> None:
    """By file and line in what is installed; each use's line is in the name of its test."""
    pytest.importorskip("transformers")
    named = [
        use.caller for use in USES if ".py " in use.caller and not use.caller.startswith(("trl", "verl"))
    ]
    unknown = [caller for caller in named if not place_of(caller)]
    # Some name an expression, an alias, or an example that is no part of the package.
    assert len(named) - len(unknown) >= 40 and len(unknown) <= 5, unknown


@pytest.mark.parametrize("use", USES, ids=str)
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_use(use: Use) -> None:
    model, rewritten = _models(use.dtype)
    named = dict(rewritten.named_parameters())  # type: ignore[attr-defined]
    truth, true_gradients, _ = _outcome(use, model, list(model.parameters()))
    found, gradients, rows = _outcome(use, rewritten, [named[name] for name, _ in model.named_parameters()])
    assert truth, "nothing is compared"
    assert [(x.shape, x.dtype) for x in found] == [(x.shape, x.dtype) for x in truth]
    bar = 2e-2 if use.dtype == torch.bfloat16 else 1e-9
    if any(t.dtype == torch.float32 for t in truth):
        bar = max(bar, 1e-6)
    assert max(relative_error(f, t) for f, t in zip(found, truth, strict=True)) <= bar
    flags = len(truth)
    assert gradients[:flags] == true_gradients[:flags], "requires_grad"
    pairs = zip(gradients[flags:], true_gradients[flags:], strict=True)
    assert max(relative_error(f, t) for f, t in pairs) <= bar
    assert use.rows is None or rows <= use.rows
