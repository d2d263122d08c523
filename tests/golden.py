"""What mst makes of the test models, written down: to see whether a change of the code changed any of it.

``python -m tests.golden OUT`` before and after the change, then ``diff -r``. One folder a case: ``report.json``
(rewrites, refusals with causes, body texts by key, without seconds), and the graphs before and after in ``graphs.txt``.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

import mst_fx
from tests.helpers import SMALL_CHUNKS, ToyLM, loss_of, token_batch
from tests.models import ACCEPTED, OTHERS, attention_batch, inputs_of

Case = tuple[nn.Module, dict[str, Any], dict[str, Any]]


def _model(name: str, checkpointed: bool = False, **more: Any) -> nn.Module:
    model: Any = {**ACCEPTED, **OTHERS}[name].build(**more).double()
    if checkpointed:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model  # type: ignore[no-any-return]


def _plain(name: str) -> Callable[[], Case]:
    return lambda: (_model(name), inputs_of({**ACCEPTED, **OTHERS}[name], 2, 41), {})


def cases() -> dict[str, Callable[[], Case]]:
    """Model, batch and what ``torch.compile`` is told beside the options, by the case's name."""
    found = {name: _plain(name) for name in {**ACCEPTED, **OTHERS}}
    for name in ("llama", "gemma3", "gpt2", "qwen2_moe"):
        found[f"{name}-checkpointed"] = lambda name=name: (  # type: ignore[misc]
            _model(name, checkpointed=True),
            attention_batch(name, 2, ""),
            {},
        )
    for variant in ("right", "left", "packed", "square"):
        found[f"mistral-{variant}"] = lambda variant=variant: (  # type: ignore[misc]
            _model("mistral"),
            attention_batch("mistral", 2, variant),
            {},
        )
    found["llama-eager"] = lambda: (
        _model("llama", attn_implementation="eager"),
        attention_batch("llama", 2, "right"),
        {},
    )
    found["llama-dynamic"] = lambda: (
        _model("llama"),
        inputs_of(ACCEPTED["llama"], 2, 41),
        {"dynamic": True},
    )
    found["gpt2-dropout"] = lambda: (
        _model("gpt2", resid_pdrop=0.1, embd_pdrop=0.1, attn_pdrop=0.1),
        inputs_of(ACCEPTED["gpt2"], 2, 41),
        {},
    )
    for order in ("pre", "post", "parallel"):
        found[f"toy-{order}"] = lambda order=order: (ToyLM(order), token_batch(2, 41), {})  # type: ignore[misc]
    return found


def record(build: Callable[[], Case], folder: Path) -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    model, batch, told = build()
    options: Any = SMALL_CHUNKS
    with mst_fx.watch() as report:
        compiled: Any = torch.compile(model, backend="mst", options=options, **told)
        loss_of(compiled(**batch)).backward()
    parts = json.loads(report.to_json())
    del parts["seconds"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "report.json").write_text(json.dumps(parts, indent=1))
    graphs = [text for pair in zip(report.before, report.after, strict=True) for text in pair]
    text = "\n\n".join(graphs).replace(str(Path(transformers.__file__).parents[1]), "site-packages")
    (folder / "graphs.txt").write_text(text.replace(str(Path(__file__).parent.parent), "."))


def main() -> None:
    out, only = Path(sys.argv[1]), sys.argv[2:]
    for name, build in cases().items():
        if not only or name in only:
            record(build, out / name)
            print(name, flush=True)


if __name__ == "__main__":
    main()
