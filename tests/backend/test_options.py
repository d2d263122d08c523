"""Options: defaults, errors that name the option, the value and what is allowed."""

from __future__ import annotations

import logging
import re
from typing import Any

import pytest
import torch

import mst_fx
from mst_fx.options import PASS_NAMES, Options, make_options
from mst_fx.torch_api.inductor import mode_patches


def test_defaults() -> None:
    assert make_options(None) == Options()
    assert make_options({}).passes == PASS_NAMES


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"chunk_rows": 0}, ["chunk_rows", "0", "auto", "≥ 1"]),
        ({"chunk_rows": True}, ["chunk_rows", "True"]),
        ({"vocab_chunk_rows": "big"}, ["vocab_chunk_rows", "'big'", "auto"]),
        ({"vocab_chunk_rows": 1.5}, ["vocab_chunk_rows", "1.5"]),
        ({"passes": ("mlp", "mpl")}, ["passes", "mpl", "mlp", "vocab"]),
        ({"passes": "mlp"}, ["passes", "'mlp'"]),
        ({"passes": 3}, ["passes", "3"]),
        ({"accumulate": "bf16"}, ["accumulate", "'bf16'", "auto", "weight"]),
        (
            {"accumulate": "float32"},
            ["accumulate", "'float32'", "one of 'auto', 'weight'"],
        ),  # it was auto's twin
        ({"logits": None}, ["logits", "None", "keep", "defer"]),
        ({"inner": "nvfuser"}, ["inner", "'nvfuser'", "aot_eager"]),
        ({"strict": 1}, ["strict", "1", "True or False"]),
        ({"inductor": 3}, ["inductor", "3"]),
        ({"chunkrows": 3}, ["chunkrows", "chunk_rows", "strict"]),
    ],
)
def test_errors_name_option_value_and_what_is_allowed(options: dict[str, Any], parts: list[str]) -> None:
    with pytest.raises(mst_fx.OptionError) as error:
        make_options(options)
    for part in parts:
        assert part in str(error.value)


def test_a_bad_option_reaches_the_user_of_torch_compile() -> None:
    compiled = torch.compile(lambda x: x + 1, backend="mst", options={"chunk_row": 3})
    with pytest.raises(Exception, match="mst has no option 'chunk_row'"):
        compiled(torch.ones(3))


def test_the_backend_is_an_entry_point() -> None:
    assert "mst" in torch._dynamo.list_backends(exclude_tags=())


def test_mode_becomes_inductor_patches() -> None:
    assert mode_patches(None) == mode_patches("default") == {}
    assert mode_patches("max-autotune-no-cudagraphs")["max_autotune"] is True
    with pytest.raises(RuntimeError, match="Unrecognized mode"):
        mode_patches("fast")


def test_mode_is_an_option_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.compile takes ``mode=`` or ``options=``, and not both."""
    seen: list[dict[str, Any]] = []

    def compile_graph(gm: Any, inputs: Any, inner: str, patches: dict[str, Any], *_: Any) -> Any:
        seen.append(patches)
        return gm.forward

    monkeypatch.setattr("mst_fx.compiling.compile_graph", compile_graph)
    options: Any = {"mode": "max-autotune-no-cudagraphs", "chunk_rows": 64}
    torch.compile(lambda x: x + 1, backend="mst", options=options)(torch.ones(3))
    assert seen == [mode_patches("max-autotune-no-cudagraphs")] and seen[0]
    with pytest.raises(mst_fx.OptionError, match=r"'mode' is 3; allowed: a mode of torch\.compile"):
        make_options({"mode": 3})


@pytest.mark.parametrize("inner", ["eager", "aot_eager", "inductor"])
def test_what_inductor_does_not_know_is_an_error(inner: str) -> None:
    options: Any = {"inner": inner, "inductor": {"max_autotun": True}}
    with pytest.raises(
        Exception, match=r"torch\._inductor\.config has no 'max_autotun'; did you mean max_autotune"
    ):
        torch.compile(lambda x: x + 1, backend="mst", options=options)(torch.ones(3))
    options = {"inner": "eager", "inductor": {"triton.unique_kernel_names": True}}
    torch.compile(lambda x: x + 2, backend="mst", options=options)(torch.ones(3))


def test_a_compilation_is_said_before_and_after(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "mst_fx"):
        options: Any = {"inner": "eager"}
        torch.compile(lambda x: (x + 1).sin(), backend="mst", options=options)(torch.ones(3))
    first, *_, last = caplog.messages
    assert first == "compiling a graph of 2 nodes …"
    assert re.fullmatch(r"… compiled in \d+\.\d s \(the insides of loops come with the first step\)", last)
