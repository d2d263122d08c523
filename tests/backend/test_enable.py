"""``mst_fx.enable``: ordinary torch.compile uses the passes, until it is disabled."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

import mst_fx
import mst_fx.torch_api.inductor
from mst_fx.logits.tensor import DeferredLogits
from tests.helpers import SMALL_CHUNKS, ToyLM, gradients, relative_error, step, token_batch, worst_error
from tests.models import ACCEPTED, inputs_of

LLAMA = ACCEPTED["llama"]
_OPTIONS = {**SMALL_CHUNKS, "inner": "eager"}
_INDUCTOR_CALL = torch._TorchCompileInductorWrapper.__call__


@pytest.fixture(autouse=True)
def _undone() -> Iterator[None]:
    yield
    assert torch._TorchCompileInductorWrapper.__call__ is _INDUCTOR_CALL


def _is_rewritten(**options: Any) -> bool:
    """Whether a new compilation of a head and its loss defers the logits, as only a rewritten one does."""
    torch._dynamo.reset()
    _, logits = torch.compile(ToyLM(layers=0), **options)(**token_batch(3, 35))
    return isinstance(logits, DeferredLogits)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_steps_agree_with_eager(checkpointing: bool) -> None:
    model, inputs = LLAMA.build(num_hidden_layers=1), inputs_of(LLAMA, 3, 35)
    if checkpointing:
        model.gradient_checkpointing_enable()  # type: ignore[operator]
    loss, truth = step(model, model, inputs)
    with mst_fx.enable(SMALL_CHUNKS):
        compiled = torch.compile(model)
        out = compiled(**inputs)
        found_loss, found = step(model, compiled, inputs)
    assert isinstance(out.logits, DeferredLogits)
    assert relative_error(found_loss, loss) <= 1e-5
    assert worst_error(found, truth) <= 1e-5


@pytest.mark.slow
def test_a_mode_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inductor gets what torch.compile's mode and options stand for; enable's own options come below them."""
    seen: list[dict[str, Any]] = []
    compile_fx: Any = vars(mst_fx.torch_api.inductor)["compile_fx"]

    def see(*args: Any, **kwargs: Any) -> Any:
        seen.append(kwargs["config_patches"])
        return compile_fx(*args, **kwargs)

    monkeypatch.setattr(mst_fx.torch_api.inductor, "compile_fx", see)
    with mst_fx.enable({"inductor": {"max_autotune": False, "epilogue_fusion": False}}):
        # Views: nothing that a C++ compiler is called for.
        torch.compile(lambda x: x.view(3, 1), options={"max_autotune": True})(torch.ones(3))
        torch.compile(lambda x: x.view(1, 3), mode="max-autotune-no-cudagraphs")(torch.ones(3))
    assert [patches["max_autotune"] for patches in seen] == [True, True]
    assert seen[0]["epilogue_fusion"] is False


def test_fullgraph_is_kept() -> None:
    def broken(x: torch.Tensor) -> torch.Tensor:
        torch._dynamo.graph_break()
        return x.sin()

    with mst_fx.enable(_OPTIONS), pytest.raises(torch._dynamo.exc.Unsupported):
        torch.compile(broken, fullgraph=True)(torch.ones(3))


def test_other_backends_are_left_alone() -> None:
    with mst_fx.enable(_OPTIONS):
        assert not _is_rewritten(backend="aot_eager")
        assert _is_rewritten(backend="mst", options=_OPTIONS)


def test_the_innermost_decides() -> None:
    with mst_fx.enable(_OPTIONS):
        with mst_fx.enable({**_OPTIONS, "passes": ("mlp",)}):
            assert not _is_rewritten()
        assert _is_rewritten()


def test_undone_in_any_order() -> None:
    first = mst_fx.enable({**_OPTIONS, "passes": ("mlp",)})
    second = mst_fx.enable(_OPTIONS)
    first.disable()
    assert _is_rewritten()
    second.disable()
    second.disable()
    assert torch._TorchCompileInductorWrapper.__call__ is _INDUCTOR_CALL


def test_undone_after_an_error() -> None:
    with pytest.raises(KeyError), mst_fx.enable(_OPTIONS):
        raise KeyError
    with pytest.raises(mst_fx.OptionError, match="chunk_row"):
        mst_fx.enable({"chunk_row": 3})


@pytest.mark.slow
def test_what_was_compiled_stays_compiled() -> None:
    """Dynamo does not ask again: as documented, and right either way."""
    model, inputs = ToyLM(layers=1), token_batch(3, 35)
    _, truth = step(model, model, inputs)
    with mst_fx.enable(_OPTIONS):
        compiled = torch.compile(model)
        compiled(**inputs)
    model.zero_grad()
    loss, logits = compiled(**inputs)
    assert isinstance(logits, DeferredLogits)
    loss.backward()
    assert worst_error(gradients(model), truth) <= 1e-5
