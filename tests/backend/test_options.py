"""Options: defaults, errors that name the option, the value and what is allowed."""

from __future__ import annotations

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
