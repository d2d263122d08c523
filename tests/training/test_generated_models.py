"""Random configurations of whole models against eager in float64: right, whatever is combined with what.

A dozen in CI; ``pytest --hypothesis-profile=long tests/training/test_generated_models.py`` runs 1,000, with ``MST_FX_SHARD=0/4``
in the environment the first of four parts of them. ``python -m tests.training.test_generated_models SEED [END]`` runs one, or
those from SEED up to END, and says what they are.
"""

from __future__ import annotations

import copy
import dataclasses
import os
import random
import sys
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from hypothesis import settings
from torch import Tensor, nn

import mst_fx
from tests.helpers import gradients, kinds, relative_error, worst_error

_BAR = 3e-6  # Hugging Face's norms and losses are in float32, whatever the model is in
_VOCAB = 67
_BASE = {
    "hidden_size": 16,
    "intermediate_size": 40,
    "num_attention_heads": 2,
    "vocab_size": _VOCAB,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GQA = {**_BASE, "num_key_value_heads": 1}
_HEADS = {**_GQA, "head_dim": 8}
_GPT2 = {
    "n_embd": 16,
    "n_head": 2,
    "vocab_size": _VOCAB,
    "n_positions": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}


@dataclasses.dataclass(frozen=True)
class _Class:
    """An architecture.

    Attributes:
        window: the name of its config's sliding window, if it has one.
        has_mlp: whether its MLPs are chunked; those of experts are not.
        packs: whether documents are told apart by their positions.
        attention: the only one that it has.
    """

    model: str
    config: str
    base: dict[str, Any]
    window: str = ""
    has_mlp: bool = True
    packs: bool = True
    attention: str = ""


_CLASSES = {
    "llama": _Class("LlamaForCausalLM", "LlamaConfig", _GQA),
    "qwen2": _Class("Qwen2ForCausalLM", "Qwen2Config", {**_GQA, "use_sliding_window": True, "max_window_layers": 0}, "sliding_window"),
    "qwen3": _Class("Qwen3ForCausalLM", "Qwen3Config", _HEADS),
    "mistral": _Class("MistralForCausalLM", "MistralConfig", _GQA, "sliding_window"),
    "gemma2": _Class("Gemma2ForCausalLM", "Gemma2Config", {**_HEADS, "query_pre_attn_scalar": 8}, "sliding_window", attention="eager"),
    "gemma3": _Class("Gemma3ForCausalLM", "Gemma3TextConfig", _HEADS, "sliding_window"),
    "gpt2": _Class("GPT2LMHeadModel", "GPT2Config", {**_GPT2, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}, packs=False),
    "gpt_neox": _Class("GPTNeoXForCausalLM", "GPTNeoXConfig", _BASE),
    "phi3": _Class("Phi3ForCausalLM", "Phi3Config", _GQA, "sliding_window"),
    "opt": _Class(
        "OPTForCausalLM",
        "OPTConfig",
        {**_BASE, "ffn_dim": 40, "word_embed_proj_dim": 16, "dropout": 0.0},
        packs=False,
    ),
    "mixtral": _Class("MixtralForCausalLM", "MixtralConfig", {**_GQA, **_EXPERTS}, "sliding_window", has_mlp=False),
    "olmo2": _Class("Olmo2ForCausalLM", "Olmo2Config", _GQA),
    "cohere": _Class("CohereForCausalLM", "CohereConfig", {**_GQA, "logit_scale": 0.25}),
    "granite": _Class("GraniteForCausalLM", "GraniteConfig", {**_GQA, "logits_scaling": 2.0}),
    "stablelm": _Class("StableLmForCausalLM", "StableLmConfig", _GQA),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Case:
    """One configuration; ``Case.of(seed)`` draws it.

    Attributes:
        lengths: tokens a sequence, of each step.
        padding: "", "ones", "left", "right" or "holes" of an attention mask.
        documents: packed into each sequence; 1: no positions are given.
        checkpoint: "", "reentrant" or "not reentrant".
        touch: what is done with the logits: "", "last", "all", "gradient" of all, "gradient of last".
        labels: "some", "all" or "few" of them are -100.
        items: how ``num_items_in_batch`` is given: "", "int" or "tensor".
        mode: "train", "eval" (with gradients) or "no_grad".
        between: what happens between steps: "" (gradients add up), "zero", "sgd".
    """

    seed: int
    name: str
    layers: int
    batch: int
    lengths: tuple[int, ...]
    window: int
    attention: str
    padding: str
    documents: int
    checkpoint: str
    dynamic: bool | None
    touch: str
    labels: str
    items: str
    tied: bool
    mode: str
    between: str
    options: dict[str, Any]

    @staticmethod
    def of(seed: int) -> Case:
        dice = random.Random(seed)
        pick: Callable[..., Any] = lambda *choices: dice.choice(choices)  # noqa: E731
        name = dice.choice(sorted(_CLASSES))
        kind = _CLASSES[name]
        steps = pick(1, 1, 1, 1, 2, 3)
        length = pick(1, 2, 7, 16, 17, 24, 33, 40)
        lengths = tuple(pick(length, length, pick(5, 16, 29, 41)) for _ in range(steps - 1))
        documents = pick(1, 1, 2, 3) if kind.packs else 1
        left = "left" if kind.attention != "eager" else "right"
        padding = pick("", "", "ones", left, "right", "holes") if documents == 1 else ""
        case = Case(
            seed=seed,
            name=name,
            layers=2 if name.startswith("gemma") else pick(1, 1, 1, 1, 2),
            batch=pick(1, 2, 3),
            lengths=(length, *lengths),
            window=0
            if not kind.window
            else pick(3, 8, 100)
            if name.startswith("gemma")
            else pick(0, 3, 8, 100),
            # Rows that see nothing are NaN in eager attention: in float64 a score less than 0 plus the least
            # number is -inf.
            attention=kind.attention
            or ("sdpa" if padding == "left" else pick("sdpa", "sdpa", "sdpa", "eager")),
            padding=padding,
            documents=documents,
            checkpoint=pick("", "", "reentrant", "not reentrant"),
            dynamic=pick(None, None, True, False),
            touch=pick("", "", "last", "all", "gradient", "gradient of last"),
            labels=pick("some", "some", "some", "few", "all"),
            items=pick("", "", "int", "tensor"),
            tied=pick(False, False, True),
            mode=pick("train", "train", "train", "train", "eval", "no_grad"),
            between=pick("", "zero", "sgd"),
            options={
                "inner": pick("eager", "eager", "aot_eager"),
                "chunk_rows": pick(1, 5, 8, 16, "auto"),
                "vocab_chunk_rows": pick(1, 6, 11, 20, "auto"),
                "attention_chunk_rows": pick(4, 7, 16, "auto"),
                "logits": pick("auto", "auto", "auto", "keep", "defer"),
            },
        )
        if case.window and case.attention == "eager" and padding in ("right", "holes"):
            return dataclasses.replace(case, padding="ones")  # a window of padding sees nothing
        if name == "gpt2" and case.dynamic:
            return dataclasses.replace(case, checkpoint="")  # Dynamo fails, whatever the backend
        return case

    def model(self) -> nn.Module:
        kind = _CLASSES[self.name]
        overrides: dict[str, Any] = {"num_hidden_layers": self.layers, "tie_word_embeddings": self.tied}
        overrides |= {kind.window: self.window or None} if kind.window else {}
        torch.manual_seed(self.seed)
        config = getattr(transformers, kind.config)(**kind.base, **overrides)
        config._attn_implementation = self.attention
        config._experts_implementation = "eager"  # the others take no float64
        model: Any = getattr(transformers, kind.model)(config).double()
        model.loss_type = "ForCausalLM"  # GPT2's is not known, and the warning breaks the graph
        if self.checkpoint:
            model.gradient_checkpointing_enable({"use_reentrant": self.checkpoint == "reentrant"})
        return model.eval() if self.mode == "eval" else model.train()  # type: ignore[no-any-return]

    def inputs(self, step: int) -> dict[str, Any]:
        length, generator = self.lengths[step], torch.Generator().manual_seed(self.seed * 10 + step)
        shape = (self.batch, length)
        ids = torch.randint(3, _VOCAB, shape, generator=generator)
        ignored = {"some": 0.3, "few": 0.95, "all": 2.0}[self.labels]
        labels = ids.masked_fill(torch.rand(shape, generator=generator) < ignored, -100)
        inputs: dict[str, Any] = {"input_ids": ids, "labels": labels}
        if self.padding:
            mask, part = torch.ones(shape, dtype=torch.long), max(1, length // 4)
            where = {"left": slice(0, part), "right": slice(length - part, None), "holes": slice(1, 1 + part)}
            if self.padding in where and length > 1:
                mask[0, where[self.padding]] = 0
            inputs |= {"attention_mask": mask, "labels": labels.masked_fill(mask == 0, -100)}
        if self.documents > 1:
            part = -(-length // self.documents)
            inputs["position_ids"] = (torch.arange(length) % part)[None].expand(shape)
        if self.items:
            inputs["num_items_in_batch"] = 9 if self.items == "int" else torch.tensor(9)
        return inputs

    def rows(self, step: int) -> int:
        return self.batch * self.lengths[step]

    def expected(self) -> set[str]:
        """The kinds of rewrites that the first step must have."""
        if self.dynamic:  # integers become symbols; GPT2's graph breaks then, and its head is not found
            return set()
        chunk_rows, vocab_rows = self.options["chunk_rows"], self.options["vocab_chunk_rows"]
        found = set()
        if _CLASSES[self.name].has_mlp and chunk_rows != "auto" and self.rows(0) > chunk_rows:
            found.add("mlp")
        if vocab_rows != "auto" and self.rows(0) > vocab_rows and self.options["logits"] != "keep":
            found.add("vocab")
        return found


def _touched(touch: str, logits: Tensor, valid: Tensor) -> Tensor:
    if touch.endswith("last"):
        return logits[:, -1] * valid[:, -1, None]
    return logits * valid[..., None]


def _run(
    case: Case, model: nn.Module, run: Callable[..., Any]
) -> list[tuple[list[Tensor], dict[str, Tensor]]]:
    """Of each step the loss and what was seen of the logits, and the gradients after it."""
    found = []
    for step in range(len(case.lengths)):
        inputs = case.inputs(step)
        valid = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).double()
        with torch.set_grad_enabled(case.mode != "no_grad"):
            out = run(**inputs)
            values, total = [out.loss.detach()], out.loss
            if case.touch:
                seen = _touched(case.touch, out.logits, valid)
                values.append(seen.detach().clone())
                if case.touch.startswith("gradient"):
                    total = total.nan_to_num() + 0.1 * seen.sin().mean()
        if case.mode != "no_grad":
            total.backward()
        found.append((values, gradients(model)))
        if case.between == "zero":
            model.zero_grad()
        elif case.between == "sgd":
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.grad is not None:
                        parameter.sub_(0.1 * parameter.grad.nan_to_num())
    return found


def check(case: Case) -> dict[str, int]:
    """Compares a configuration with eager; returns the kinds of rewrites."""
    model = case.model()
    truth = _run(case, twin := copy.deepcopy(model), twin)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="mst", options=case.options, dynamic=case.dynamic)
    with mst_fx.watch() as report:
        found = _run(case, model, compiled)
    for step, ((values, grads), (true_values, true_grads)) in enumerate(zip(found, truth, strict=True)):
        for value, true in zip(values, true_values, strict=True):
            assert relative_error(value, true) <= _BAR, f"loss or logits of step {step}"
        assert not true_grads or worst_error(grads, true_grads) <= _BAR, f"gradients of step {step}"
    rewritten = kinds(report)
    assert case.expected() <= rewritten.keys(), f"{rewritten}: {report.refusals}"
    return rewritten


def _seeds() -> range:
    """A dozen, unless the profile asks for more than it asks of others; of these the shard's."""
    count = settings().max_examples
    index, shards = map(int, os.environ.get("MST_FX_SHARD", "0/1").split("/"))
    return range(index, 12 if count <= 50 else count, shards)


@pytest.mark.parametrize("seed", _seeds())
def test_a_generated_model(seed: int) -> None:
    try:
        check(Case.of(seed))
    except Exception as error:
        error.add_note(f"python -m tests.training.test_generated_models {seed}  # {Case.of(seed)}")
        raise


def _main(first: int, end: int) -> None:
    start, rewritten, failed = time.process_time(), 0, 0
    for seed in range(first, end):
        case = Case.of(seed)
        try:
            found = check(case)
            rewritten += bool(found)
            print(case if end - first == 1 else seed, found)
        except Exception as error:
            failed += 1
            print(
                f"python -m tests.training.test_generated_models {seed}  # {type(error).__name__}: {str(error)[:300]}\n  {case}"
            )
            if end - first == 1:
                raise
        sys.stdout.flush()
    seconds = (time.process_time() - start) / (end - first)
    print(f"{failed} of {end - first} failed, {rewritten} rewritten, {seconds:.1f} CPU s each")


if __name__ == "__main__":
    arguments = [int(x) for x in sys.argv[1:]]
    _main(arguments[0], arguments[1] if len(arguments) > 1 else arguments[0] + 1)
