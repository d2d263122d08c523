"""One warning a process and cause, where a step of training loses the saving; silence everywhere else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import mst_fx
from mst_fx import process
from tests import apart
from tests.helpers import EAGER_BODIES, GatedMLP, compile_mst

V, H, LENGTH = 96, 16, 1024


class Model(nn.Module):
    """A toy in float32; the loss only if there are labels."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mlp, self.head = nn.Embedding(V, H), GatedMLP(H, 40), nn.Linear(H, V)

    def forward(
        self, ids: Tensor, labels: Tensor | None = None, breaks: bool = False, writes: bool = False
    ) -> Any:
        x = self.embed(ids)
        logits = self.head(x + self.mlp(x))
        if breaks:
            torch._dynamo.graph_break()
        if writes:
            logits[..., V - 6 :] = float("-inf")
        return logits if labels is None else F.cross_entropy(logits.flatten(0, 1), labels.flatten())


def _ids(length: int = LENGTH) -> Tensor:
    return torch.randint(0, V - 6, (2, length))


def _warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    """The causes of what was said."""
    found = [r.getMessage().partition(":")[0] for r in caplog.records if r.levelname == "WARNING"]
    caplog.clear()
    return found


def test_the_loss_outside(caplog: pytest.LogCaptureFixture) -> None:
    model, ids = Model(), _ids()
    run = compile_mst(model, EAGER_BODIES)
    F.cross_entropy(run(ids).flatten(0, 1), ids.flatten()).backward()
    text = caplog.text
    assert "head" in text and "768.0 KiB" in text and "fix:" in text and "setLevel(logging.ERROR)" in text
    assert _warnings(caplog) == ["loss-not-compiled"]
    compile_mst(model, EAGER_BODIES)(ids)  # once a process
    assert _warnings(caplog) == []
    process.reset()
    compile_mst(model, EAGER_BODIES)(ids)
    assert _warnings(caplog) == ["loss-not-compiled"]


@pytest.mark.slow
def test_with_the_logging_of_python_as_it_is(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(
        "import torch\nfrom tests.diagnose.test_warnings import Model, _ids, compile_mst\n"
        "run = compile_mst(Model(), {'inner': 'eager'})\nrun(_ids())\nprint('done')\n"
    )
    done = apart.run_script(program, env={"PYTHONPATH": "."})
    assert done.stdout == "done\n" and done.stderr.startswith("loss-not-compiled: "), done.stderr


def test_the_loss_behind_a_break(caplog: pytest.LogCaptureFixture) -> None:
    ids = _ids()
    compile_mst(Model(), EAGER_BODIES)(ids, ids, breaks=True).backward()
    assert "test_warnings.py" in caplog.text
    assert _warnings(caplog) == ["loss-behind-a-break"]


def test_a_head_that_is_refused(caplog: pytest.LogCaptureFixture) -> None:
    def mixed(ids: Tensor) -> Tensor:
        return F.cross_entropy(model(ids).cumsum(1).flatten(0, 1), ids.flatten())

    model = Model()
    compile_mst(mixed, EAGER_BODIES)(_ids()).backward()
    assert _warnings(caplog) == ["head-refused"]


def test_only_layers_compiled(caplog: pytest.LogCaptureFixture) -> None:
    model, ids = Model(), _ids()
    model.mlp.compile(backend="mst", options=EAGER_BODIES)
    model(ids, ids).backward()
    assert "Model.head" in caplog.text
    assert _warnings(caplog) == ["head-not-compiled"]
    model.eval()
    process.reset()
    torch._dynamo.reset()
    with torch.no_grad():
        model(ids, ids)
    assert _warnings(caplog) == []


class Layer(nn.Module):
    """An MLP with a hook that breaks the graph, as FSDP2's do."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = GatedMLP(H, 40)

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(x) + x


class Looping(Model):
    """Its function is skipped by Dynamo, for the break lies in a loop: its head runs eagerly."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Layer()])
        self.layers[0].register_forward_hook(torch._dynamo.disable(lambda module, args, output: None))

    def forward(self, ids: Tensor, labels: Tensor | None = None, *args: Any) -> Any:
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        logits = self.head(x)
        return logits if labels is None else F.cross_entropy(logits.flatten(0, 1), labels.flatten())


class Apart(Looping):
    """The same with the head and the loss in a module of their own."""

    class Loss(nn.Module):
        def __init__(self, head: nn.Linear) -> None:
            super().__init__()
            self.head = head

        def forward(self, x: Tensor, labels: Tensor) -> Tensor:
            return F.cross_entropy(self.head(x).flatten(0, 1), labels.flatten())

    def __init__(self) -> None:
        super().__init__()
        self.loss = self.Loss(self.head)

    def forward(self, ids: Tensor, labels: Tensor | None = None, *args: Any) -> Any:
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return self.loss(x, labels)


class Straight(Looping):
    """Broken too, but not in a loop: Dynamo goes on behind the break, and has the head with its loss."""

    def forward(self, ids: Tensor, labels: Tensor | None = None, *args: Any) -> Any:
        logits = self.head(self.layers[0](self.embed(ids)))
        assert labels is not None
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten())


class Around(nn.Module):
    """A wrapper whose own function is skipped, around a model that is compiled whole."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *args: Any) -> Any:
        for _ in range(1):
            torch._dynamo.graph_break()
            result = self.model(*args)
        return result


@pytest.mark.slow
def test_a_function_that_dynamo_skips(caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    ids = _ids()
    for labels in (ids, None):
        process.reset()
        torch._dynamo.reset()
        with mst_fx.watch() as report:
            compile_mst(Looping(), EAGER_BODIES)(ids, labels).sum().backward()
        assert [f.cause for f in report.findings] == ["head-not-compiled"]
        assert (
            "Looping.head" in report.findings[0].evidence
            and "test_warnings.py" in report.findings[0].evidence
        )
        assert _warnings(caplog) == ["head-not-compiled"]
    process.reset()
    for model in (Apart(), Straight(), Around(Straight())):
        torch._dynamo.reset()
        with mst_fx.watch() as report:
            compile_mst(model, EAGER_BODIES)(ids, ids).backward()
        assert {r.kind for r in report.rewrites} >= {"mlp", "vocab"}, type(model)
        assert _warnings(caplog) == [] and report.findings == [], type(model)


class Noisy(nn.Module):
    """A layer whose forward function breaks the graph, in a way of its own."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.mlp, self.how, self.seen = GatedMLP(H, 40), how, 0.0

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "break":
            torch._dynamo.graph_break()
        elif self.how == "print":
            print("a layer", end="")
        elif self.how == "item":
            self.seen = x.sum().item()
        elif self.how == "disabled":
            torch._dynamo.disable(lambda: None)()
        elif self.how == "branch" and x.sum() > 1e9:
            return x
        return x + self.mlp(x)


class Checkpointed(Model):
    """Its layers are checkpointed: in a loop, where Dynamo skips the whole function, or one after the other."""

    def __init__(self, how: str, in_loop: bool) -> None:
        super().__init__()
        self.layers, self.in_loop = nn.ModuleList([Noisy(how), Noisy(how)]), in_loop

    def forward(self, ids: Tensor, *args: Any) -> Tensor:
        x = self.embed(ids)
        if self.in_loop:
            for layer in self.layers:
                x = checkpoint(layer, x, use_reentrant=False)
        else:
            x = checkpoint(self.layers[0], x, use_reentrant=False)
        return F.cross_entropy(self.head(x).flatten(0, 1), ids.flatten())


@pytest.mark.parametrize("in_loop", [True, False])
@pytest.mark.parametrize("how", ["break", "print", "item", "disabled", "branch"])
def test_a_checkpointed_layer_that_breaks(how: str, in_loop: bool, caplog: pytest.LogCaptureFixture) -> None:
    model, ids = Checkpointed(how, in_loop), _ids()
    with mst_fx.watch() as report:
        compile_mst(model, EAGER_BODIES)(ids).backward()
    assert [f.cause for f in report.findings] == ["eager-checkpoint"]
    assert f"{__file__}:" in report.findings[0].evidence and f"{__file__}:" in caplog.text
    assert _warnings(caplog)[-1:] == ["eager-checkpoint"]  # Dynamo has a word of its own for .item()
    assert [r.kind for r in report.rewrites] == ([] if in_loop else ["vocab"])


def test_checkpointed_layers_of_others_and_without_breaks(caplog: pytest.LogCaptureFixture) -> None:
    ids = _ids()
    with mst_fx.watch() as report:
        compile_mst(Checkpointed("", True), EAGER_BODIES)(ids).backward()
        torch.compile(Checkpointed("print", True), backend="eager")(ids).backward()
    assert not report.findings and not report.eager_checkpoints
    mst_fx.explain(Checkpointed("print", True), EAGER_BODIES)(ids)
    with pytest.raises(torch._dynamo.exc.Unsupported):
        compile_mst(Checkpointed("print", True), EAGER_BODIES, fullgraph=True)(ids)
    assert _warnings(caplog) == []
    with mst_fx.enable(EAGER_BODIES):
        torch._dynamo.reset()
        torch.compile(Checkpointed("print", True))(ids).backward()
    assert _warnings(caplog) == ["eager-checkpoint"]


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(H, 3 * H)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        q, k, v = self.qkv(x).view(*x.shape[:2], 3, 2, H // 2).permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def test_a_mask_from_outside(caplog: pytest.LogCaptureFixture) -> None:
    """Of a layer, whose model made it, and of a caller, whose own it is: each has a fix that can be followed."""
    x, mask = torch.randn(1, 300, H), torch.ones(1, 1, 300, 300, dtype=torch.bool).tril()
    added = torch.zeros(1, 1, 300, 300).masked_fill(~mask, float("-inf"))
    model = Attention()
    for given, rows, cause, fix in (
        (mask, x, "mask-given", "padding mask [B, S]"),
        (added, x, "mask-given", "comparing vectors"),
        (mask, x.clone().requires_grad_(), "mask-outside", "the whole model in one graph"),
    ):
        caplog.clear()
        process.reset()
        with mst_fx.watch() as report:
            compile_mst(model, EAGER_BODIES)(rows, given).sum().backward()
        (finding,) = [finding for finding in report.findings if finding.cause.startswith("mask-")]
        assert finding.cause == cause and fix in finding.fix
        assert _warnings(caplog) == [cause]


@pytest.mark.slow
def test_silence(caplog: pytest.LogCaptureFixture) -> None:
    """With the loss, without gradients, in one chunk, with logits that are kept or deferred on purpose, when asked."""
    model, ids = Model(), _ids()
    compile_mst(model, EAGER_BODIES)(ids, ids).backward()
    with torch.no_grad():
        compile_mst(model, EAGER_BODIES)(ids)
    compile_mst(model, EAGER_BODIES)(_ids(100))
    compile_mst(model, {**EAGER_BODIES, "logits": "defer"})(ids)
    compile_mst(lambda: (model(ids), model(ids, ids)), {**EAGER_BODIES, "logits": "keep"})()
    mst_fx.explain(model, EAGER_BODIES)(ids)
    compile_mst(GatedMLP(H, 40), EAGER_BODIES)(torch.randn(2, LENGTH, H, requires_grad=True))
    assert _warnings(caplog) == []
