"""Systems that others have built, as examples: rewritten, with eager's numbers, and at the memory that they promise.

Each example runs as it is, in a process with the malloc meter, under mst (the inside by eager, which compiles sooner)
and then eagerly; functions of its are called again, and measured.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import importlib
import io
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mst_fx
from tests.helpers import kinds, relative_error, warm_peak
from tools.meters.cpu import call_metered, is_available, malloc_meter

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not is_available(), reason="needs Linux and a C compiler"),
]

_FOLDER = Path(__file__).parents[2] / "examples"
_BAR = 1e-5  # float32
_MIB = 2**20

Found = dict[str, Any]


def _run(way: str, name: str, *arguments: Any) -> tuple[Found, Found]:
    """The names of an example that has run in this process; what was rewritten and printed."""
    torch._dynamo.reset()
    gc.collect()
    os.environ["EXAMPLES_INNER"] = "eager"
    sys.path[:0], sys.argv = [str(_FOLDER)], [name, *map(str, arguments)]
    sys.modules.pop(name, None)
    if way == "eager":  # for good: the last one of this process
        torch.compile = lambda **_: lambda function: function  # type: ignore[assignment]
        nn.Module.compile = lambda *_, **__: None  # type: ignore[method-assign]
    with mst_fx.watch() as report, contextlib.redirect_stdout(io.StringIO()) as out:
        names = vars(importlib.import_module(name))
    refused = [f"{each.kind} {each.name}: {each.reason}" for each in report.refusals]
    return names, {"kinds": kinds(report), "refused": refused, "printed": out.getvalue()}


def _ids(names: Found, length: int) -> Tensor:
    return names["token_blocks"](1, length)[0]["input_ids"][None]  # type: ignore[no-any-return]


def _each(function: Callable[..., Found], *cases: Sequence[Any]) -> list[Found]:
    """What it returns for each case, one after the other, in one process; the last one is eager."""
    found: list[Found] = call_metered(_in_turn, function, cases)
    assert not any(each["refused"] for each in found), found[0]["refused"]
    assert cases[-1][0] == "eager" and not found[-1]["kinds"]
    return found


def _in_turn(function: Callable[..., Found], cases: Sequence[Sequence[Any]]) -> list[Found]:
    return [function(*case) for case in cases]


# MeZO-SVRG


def _svrg(way: str, steps: int) -> Found:
    names, found = _run(way, "zeroth_order_svrg", steps)
    model, ids = names["model"], names["data"][0]
    found["weights"] = torch.cat([weight.flatten() for weight in model.parameters()])
    found["noise"] = max(weight.nbytes for weight in model.parameters())
    score = functools.partial(model, input_ids=ids, labels=ids, use_cache=False)
    found["prefill"] = warm_peak(score)
    found["step"] = warm_peak(lambda: names["slope"](model, 0, [ids]))
    if way == "eager":
        fresh = names["toy_llama"]().eval().requires_grad_(False)
        found["start"] = sum(float(fresh(input_ids=x, labels=x).loss) for x in names["data"]) / 2
        found["slope"] = names["slope"](model, 7, [ids])
        before = [weight.clone() for weight in model.parameters()]
        names["perturb"](model, 7, 1.0)
        noise = [weight - x for weight, x in zip(model.parameters(), before, strict=True)]
        names["perturb"](model, 7, -1.0)
        model.requires_grad_()
        gradients = torch.autograd.grad(score().loss, list(model.parameters()))
        found["derivative"] = sum(float((g * z).sum()) for g, z in zip(gradients, noise, strict=True))
        found["training"] = warm_peak(lambda: torch.autograd.grad(score().loss, list(model.parameters())))
    return found


def test_zeroth_order_steps_with_an_anchor() -> None:
    mst, eager = _each(_svrg, ("mst", 4), ("eager", 4))
    assert mst["kinds"] == {"attention": 2, "mlp": 2, "vocab": 1}
    losses = [float(x) for x in re.findall(r"loss ([\d.]+)", mst["printed"])]
    assert len(losses) == 4 and losses[-1] < losses[0] < eager["start"]
    assert eager["slope"] == pytest.approx(eager["derivative"], rel=0.02)
    assert relative_error(mst["weights"], eager["weights"]) <= 1e-4  # a loss's rounding over 2 epsilon
    for found in (mst, eager):
        print({key: round(found[key] / _MIB, 2) for key in ("prefill", "step", "training") if key in found})
    assert mst["step"] <= mst["prefill"] + 2 * mst["noise"]
    assert mst["step"] <= 0.4 * eager["step"] and mst["step"] <= 0.1 * eager["training"]


# SHERL


def _frozen(way: str, layers: int) -> Found:
    names, found = _run(way, "frozen_layers", layers)
    model, ids = names["model"], names["batch"]["input_ids"][None]
    found["weights"] = torch.cat([model.down.weight.flatten(), model.up.weight.flatten()]).detach()

    def step() -> int:
        level = malloc_meter().current()
        loss = model(ids, ids)
        kept = malloc_meter().current() - level
        loss.backward()
        return kept

    found["peak"], found["kept"] = warm_peak(step), step()
    if way == "eager":
        fresh, plain = names["Tuned"](layers, 1), names["toy_llama"](layers)
        found["at first"], found["plain"] = fresh(ids, ids).item(), plain(ids, labels=ids).loss.item()
        model.llama.requires_grad_()
        found["all kept"] = step()
    return found


def test_frozen_layers_keep_nothing() -> None:
    mst, more, eager = _each(_frozen, ("mst", 3), ("mst", 4), ("eager", 3))
    assert mst["kinds"] == {"attention": 3, "mlp": 3, "vocab": 1}
    assert eager["at first"] == pytest.approx(eager["plain"], rel=_BAR)
    assert relative_error(mst["weights"], eager["weights"]) <= 1e-4  # eight steps of AdamW
    for found in (mst, more, eager):
        print({key: round(found[key] / _MIB, 2) for key in ("peak", "kept", "all kept") if key in found})
    hidden = 2048 * 64 * 4
    assert more["kept"] <= mst["kept"] + hidden // 4  # of one frozen layer more nothing
    assert more["peak"] <= mst["peak"] + 1.5 * hidden  # but what it gives, until that is mixed
    assert mst["peak"] <= 0.5 * eager["peak"] and mst["kept"] <= 0.2 * eager["all kept"]


# HOMER


def _merged(way: str, height: int) -> Found:
    names, found = _run(way, "merged_context", height)
    prompt = names["prompt"]
    found |= {key: names[key] for key in ("hidden", "places", "cached")}
    found["peak"] = warm_peak(lambda: names["merge"](prompt, height))
    found["prefill"] = warm_peak(lambda: names["model"].model(prompt))
    if way == "eager":  # of one chunk, and nothing merged, all layers give what the model gives
        decoder, ids = names["model"].model, prompt[:, : names["size"]]
        places = torch.arange(ids.shape[1])[None, :, None]
        hidden, _, scores = names["run"](decoder.embed_tokens(ids), places, 0, len(decoder.layers))
        found["alone"], found["plain"] = decoder.norm(hidden), decoder(ids).last_hidden_state
        found["scores"] = scores.shape
    return found


def test_merged_context() -> None:
    mst, longer, eager = _each(_merged, ("mst", 1), ("mst", 3), ("eager", 1))
    assert mst["kinds"] == {"attention": 4, "mlp": 4}
    assert relative_error(eager["alone"], eager["plain"]) <= _BAR and eager["scores"] == (1024,)
    assert torch.equal(mst["places"], eager["places"])
    assert relative_error(mst["hidden"], eager["hidden"]) <= _BAR
    assert max(map(relative_error, mst["cached"], eager["cached"])) <= _BAR
    assert [x.shape[-2] for x in mst["cached"]] == [512] * 4
    for found in (mst, longer, eager):
        print({key: round(found[key] / _MIB, 2) for key in ("peak", "prefill")})
    assert longer["peak"] <= 1.5 * mst["peak"] and longer["prefill"] >= 3 * mst["prefill"]


# InfLLM


def _looked_up(way: str, chunks: int) -> Found:
    names, found = _run(way, "looked_up_context", chunks)
    model, size = names["model"], names["size"]
    found["logits"] = names["logits"]
    ids = _ids(names, size)
    places = torch.arange(chunks * size, (chunks + 1) * size)[None]
    found["peak"] = warm_peak(lambda: model(ids, position_ids=places, use_cache=False, logits_to_keep=1))
    found["stored"] = sum(x.nbytes for blocks in names["past"] for block in blocks for x in block)
    if way == "eager":  # who looks up all blocks sees what the model sees
        names["near"], names["past"] = 1000, [[] for _ in model.model.layers]
        text = names["token_blocks"](1, 2 * size)[0]["input_ids"][None]
        for places in torch.arange(2 * size)[None].split(size, 1):
            given = {"position_ids": places, "use_cache": False, "logits_to_keep": 1}
            found["all"] = model(text[:, places[0]], **given).logits
        found["plain"] = names["toy_llama"]().eval()(text, logits_to_keep=1).logits.detach()
    return found


def test_looked_up_context() -> None:
    mst, longer, eager = _each(_looked_up, ("mst", 2), ("mst", 8), ("eager", 2))
    assert mst["kinds"] == {"attention": 2, "mlp": 1}
    assert relative_error(mst["logits"], eager["logits"]) <= _BAR
    assert relative_error(eager["all"], eager["plain"]) <= _BAR
    for found in (mst, longer, eager):
        print({key: round(found[key] / _MIB, 2) for key in ("peak", "stored")})
    assert longer["peak"] <= 1.1 * mst["peak"] <= 0.7 * eager["peak"]
    assert longer["stored"] >= 2.4 * mst["stored"]  # on the host


# LoRC


def _low_rank(way: str, *arguments: int) -> Found:
    names, found = _run(way, "low_rank_cache", *arguments)
    model, prompt = names["model"], names["prompt"]
    layers = names["out"].past_key_values.layers
    found |= {"tokens": names["out"].sequences, "held": names["held"], "length": layers[0].keys.shape[2]}
    with torch.no_grad():
        score = functools.partial(model, prompt, use_cache=True, logits_to_keep=1)
        found["logits"], found["peak"] = score().logits, warm_peak(score)
        if way == "eager":
            plain = names["toy_llama"]().eval()
            found["plain"] = plain(prompt, logits_to_keep=1).logits
            found["plain tokens"] = plain.generate(prompt, max_new_tokens=8, use_cache=True)
            found["plain peak"] = warm_peak(
                functools.partial(plain, prompt, use_cache=True, logits_to_keep=1)
            )
    return found


def test_low_rank_cache() -> None:
    mst, whole, eager = _each(
        _low_rank, ("mst", 2000, 8, 16), ("eager", 2000, 32, 32), ("eager", 2000, 8, 16)
    )
    assert mst["kinds"] == {"attention": 2, "mlp": 2}
    assert torch.equal(mst["tokens"], eager["tokens"])
    assert relative_error(mst["logits"], eager["logits"]) <= _BAR
    # of whole rank it is the model as it was
    assert torch.equal(whole["tokens"], whole["plain tokens"])
    assert (
        relative_error(whole["logits"], whole["plain"])
        <= _BAR
        < relative_error(eager["logits"], whole["plain"])
    )
    assert mst["held"] == 4 * mst["length"] * 2 * (8 + 16) and whole["held"] == 4 * mst["length"] * 2 * 64
    for found in (mst, eager, whole):
        print({key: round(found[key] / _MIB, 2) for key in ("peak", "held", "plain peak") if key in found})
    assert mst["peak"] <= 0.5 * eager["peak"]
