"""Each cause on a case that has it for real, and none where nothing is wrong."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers
from torch import Tensor, fx, nn
from torch._dynamo import config as dynamo_config
from torch._guards import CompileContext, CompileId, compile_context
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

import mst_fx
from mst_fx.cli import main as cli
from mst_fx.diagnose import watch as watching
from mst_fx.diagnose.findings import Diagnosis, Finding, Memory
from mst_fx.diagnose.page import make_page
from mst_fx.diagnose.watch import LastAttempts
from tests.helpers import SMALL_CHUNKS, GatedMLP, ToyLM, compile_mst, report_of, token_batch
from tests.models import ACCEPTED, VOCAB
from tools.bench.models import Shape, make_llama, text_tokens
from tools.meters.cpu import measure_cpu

LENGTH = 130
OPTIONS = {**SMALL_CHUNKS, "inner": "eager"}  # what is said does not depend on what compiles the rest


def _causes(report: Diagnosis) -> list[str]:
    return [finding.cause for finding in report.findings]


def _finding(report: Diagnosis, cause: str) -> Finding:
    (found,) = [finding for finding in report.findings if finding.cause == cause]
    return found


def _batch() -> dict[str, Any]:
    ids = text_tokens(LENGTH, VOCAB)[None]
    return {"input_ids": ids, "labels": ids, "use_cache": False}


def _llama(layers: int = 1) -> Any:
    return ACCEPTED["llama"].build(intermediate_size=256, num_key_value_heads=4, num_hidden_layers=layers)


def _gpt2() -> Any:
    config = transformers.GPT2Config(
        n_embd=64, n_layer=1, n_head=4, vocab_size=VOCAB, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0
    )
    return transformers.GPT2LMHeadModel(config).train()


def _mixtral(experts: str) -> Any:
    sizes: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1}
    heads: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 2}
    how: dict[str, Any] = {"vocab_size": VOCAB, "experts_implementation": experts}
    config = transformers.MixtralConfig(**sizes, **heads, **how)
    return transformers.MixtralForCausalLM(config).train()


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_nothing_to_say() -> None:
    assert report_of(_llama(), OPTIONS, **_batch()).findings == []


def test_a_break_between_head_and_loss() -> None:
    model = _gpt2()
    report = report_of(model, OPTIONS, **_batch())
    assert _causes(report) == ["loss-behind-a-break"]
    finding = _finding(report, "loss-behind-a-break")
    path, line = finding.evidence.partition(" at ")[2].split(":")[:2]
    forward, first = inspect.getsourcelines(transformers.GPT2LMHeadModel.forward)
    assert path.endswith("modeling_gpt2.py")
    assert "self.loss_function(" in forward[int(line) - first], "the line that breaks the graph"
    model.loss_type = "ForCausalLM"  # the fix
    assert 'model.loss_type = "ForCausalLM"' in finding.fix
    assert report_of(model, OPTIONS, **_batch()).findings == []


def test_ddp_splits(process_group: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "_DEFAULT_FIRST_BUCKET_BYTES", 20_000)
    model = DistributedDataParallel(_llama(layers=2), bucket_cap_mb=0.05)
    report = report_of(model, OPTIONS, **_batch())
    assert _causes(report)[0] == "split-by-ddp" and report.graphs > 4
    # Graphs of one frame are all counted.
    assert len({facts.compile_id for facts in report.facts}) == 1 < report.graphs == len(report.facts)
    assert not any(rewrite.kind == "mlp" for rewrite in report.rewrites)
    assert "optimize_ddp = False" in _finding(report, "split-by-ddp").fix
    with dynamo_config.patch(optimize_ddp=False):  # the fix
        report = report_of(model, OPTIONS, **_batch())
    assert report.findings == [] and sum(rewrite.kind == "mlp" for rewrite in report.rewrites) == 2


def test_only_layers_compiled() -> None:
    model = _llama()
    for layer in model.model.layers:
        layer.compile(backend="mst", options=OPTIONS)
    with mst_fx.watch() as report:
        model(**_batch())
    assert _causes(report) == ["head-not-compiled"]


def test_regions_compiled_by_accelerate() -> None:
    compile_regions = pytest.importorskip("accelerate.utils").compile_regions
    model = compile_regions(_llama(), backend="mst", options=OPTIONS)
    with mst_fx.watch() as report:
        model(**_batch())
    assert _causes(report) == ["head-not-compiled"]


class _Tail(nn.Module):
    """Dynamo does not look into ``forward`` of torch's own modules, where these are called by themselves."""

    def __init__(self, model: ToyLM) -> None:
        super().__init__()
        self.norm, self.head = model.norm, model.head

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(x))


def test_layers_and_head_compiled_apart() -> None:
    model, inputs = ToyLM(layers=1), token_batch(2, LENGTH)
    tail = _Tail(model)
    for part in (*model.blocks, tail):
        part.compile(backend="mst", options=OPTIONS)
    with mst_fx.watch() as report:
        tail(model.blocks[0](model.embed(inputs["ids"])))
    assert [facts.has_head for facts in report.facts] == [False, True]
    assert _causes(report) == ["head-not-compiled"]


def test_layers_without_a_head_are_no_finding() -> None:
    """An encoder's embeddings are in its graph: it has all that there is."""
    ids = text_tokens(LENGTH, VOCAB)[None]
    assert report_of(_llama().model, OPTIONS, input_ids=ids, use_cache=False).findings == []


def test_a_wrapper_that_is_bypassed() -> None:
    """What accelerate's unwrap_model does, and TRL with it."""
    extract_model_from_parallel = pytest.importorskip("accelerate.utils").extract_model_from_parallel
    model = _llama()
    wrapped = compile_mst(model, OPTIONS)
    with mst_fx.watch() as report:
        extract_model_from_parallel(wrapped, keep_torch_compile=False)(**_batch())
    assert _causes(report) == ["nothing-compiled"]
    assert "LlamaForCausalLM" in report.findings[0].evidence
    del wrapped
    model.compile(backend="mst", options=OPTIONS)  # the fix
    with mst_fx.watch() as report:
        extract_model_from_parallel(model, keep_torch_compile=False)(**_batch())
    assert report.findings == [] and report.graphs == 1


def test_eager_experts() -> None:
    report = report_of(_mixtral("eager"), OPTIONS, **_batch())
    assert "eager-experts" in _causes(report) and "head-not-compiled" not in _causes(report)
    assert "mixtral" in _finding(report, "eager-experts").evidence


def _inside_broken(kind: str) -> Any:
    class Broken(GatedMLP):
        def forward(self, x: Tensor) -> Tensor:
            inner = torch.relu(self.gate(x))
            if kind == "print":
                print("inside")
            elif kind == "item" and inner.sum().item() > 1e9:
                inner = inner * 2
            elif kind == "rows":
                inner = inner[inner.sum(-1) > 0]
            return self.down(inner * 2)

    return Broken(64, 256)


@pytest.mark.parametrize("kind", ["print", "item", "rows"])
def test_an_ordinary_break_is_called_that(kind: str) -> None:
    """Data-dependent shapes too, where no expert is picked."""
    x = torch.randn(2, LENGTH, 64, requires_grad=True)
    model = _inside_broken(kind)
    report = report_of(model, OPTIONS, x)
    assert _causes(report) == ["graph-break"]
    code, first = inspect.getsourcelines(type(model).forward)
    path, line = _finding(report, "graph-break").evidence.partition(", at ")[2].split(" ")[0].rsplit(":", 1)
    word = {"print": "print(", "item": ".item()", "rows": "inner["}[kind]
    assert path == __file__ and word in code[int(line) - first]


def _divergence(logits: Tensor) -> Tensor:
    return -logits.log_softmax(-1)[..., 3].mean()


@pytest.mark.parametrize(
    "loss", [_divergence, lambda x: F.relu(x).log1p().amax(1).mean()], ids=["own", "splade"]
)
def test_a_head_with_any_loss_is_in_the_graph(loss: Any) -> None:
    model = ToyLM(layers=1)
    tail = _Tail(model)
    hidden = torch.randn(2, LENGTH, 16, dtype=torch.float64, requires_grad=True)
    report = report_of(lambda x: loss(tail(model.blocks[0](x))), None, hidden)
    assert any(facts.has_loss for facts in report.facts)
    assert not {"head-not-compiled", "loss-not-compiled"} & set(_causes(report))


def test_layers_of_a_model_without_a_vocabulary() -> None:
    """A block of a diffusion transformer, an encoder: there is no head that could be compiled."""
    layers = nn.Sequential(GatedMLP(16, 64), GatedMLP(16, 64))
    for layer in layers:
        layer.compile(backend="mst", options=OPTIONS)
    with mst_fx.watch() as report:
        layers(torch.randn(2, LENGTH, 16, requires_grad=True))
    assert report.rewrites and report.findings == []


@pytest.mark.parametrize("experts", ["grouped_mm", "batched_mm"])
def test_experts_by_groups(experts: str) -> None:
    """Which are no eager ones, and run in a loop."""
    report = report_of(_mixtral(experts), OPTIONS, **_batch())
    assert _causes(report) == [] and "model.layers.0.mlp.experts" in [r.name for r in report.rewrites]


def _accuracy(logits: Tensor, labels: Tensor) -> Tensor:
    return (logits.argmax(-1) == labels).double().mean()


def test_logits_used_by_whom(caplog: pytest.LogCaptureFixture) -> None:
    model, inputs = ToyLM(layers=1), token_batch(2, LENGTH)
    run = compile_mst(model, OPTIONS)
    with mst_fx.watch() as report, caplog.at_level("INFO", "mst_fx"):
        for _ in range(2):
            _, logits = run(**inputs)
            _accuracy(logits, inputs["labels"])
    assert _causes(report) == ["logits-used"]
    line = inspect.getsourcelines(_accuracy)[1] + 1
    (place,) = report.logits_used
    assert place == f"{__file__}:{line} in _accuracy"
    assert place in report.findings[0].evidence
    assert caplog.messages.count(f"deferred logits are computed for {place}") == 1
    with mst_fx.watch() as report:
        logits.argmax()  # computed already
    assert report.logits_used == []


def test_logits_kept() -> None:
    model, inputs = ToyLM(layers=1), token_batch(2, LENGTH)
    assert _causes(report_of(model, {**OPTIONS, "logits": "keep"}, **inputs)) == ["logits-kept"]


def test_loss_outside() -> None:
    ids = text_tokens(LENGTH, VOCAB)[None]
    report = report_of(_llama(), OPTIONS, input_ids=ids, use_cache=False)
    assert _causes(report) == ["loss-not-compiled"]
    assert "lm_head" in report.findings[0].evidence


def test_short_sequences() -> None:
    report = report_of(_llama(), {"inner": "eager"}, **_batch())
    assert _causes(report) == ["short"]
    assert "130 rows fit in one chunk of 256" in report.findings[0].evidence


def test_tensor_parallel_weights(process_group: None) -> None:
    plan: Any = {"gate": ColwiseParallel(), "up": ColwiseParallel(), "down": RowwiseParallel()}
    block = parallelize_module(GatedMLP(64, 256), init_device_mesh("cpu", (1,)), plan)
    report = report_of(block, OPTIONS, torch.randn(1, LENGTH, 64))
    assert _causes(report) == ["sharded-weights"] and "3 weight(s)" in report.findings[0].evidence


def test_graphs_of_an_attempt_that_dynamo_gave_up_are_not() -> None:
    found: LastAttempts[tuple[int, int]] = LastAttempts()
    for frame, attempts in ((0, 2), (1, 1)):
        context = CompileContext(CompileId(frame_id=frame, frame_compile_id=0))
        with compile_context(context):
            for context.attempt in range(attempts):
                found.add((frame, context.attempt))
    assert list(found) == [(0, 1), (1, 0)]


@pytest.mark.slow
def test_trl_bypasses_a_wrapper(tmp_path: Path) -> None:
    trl: Any = pytest.importorskip("trl")
    datasets: Any = pytest.importorskip("datasets")
    data = datasets.Dataset.from_list([{"input_ids": text_tokens(LENGTH, VOCAB).tolist()}])
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<pad>": 0, "<end>": 1}, unk_token="<end>"))
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="<end>"
    )
    settings = trl.SFTConfig(
        output_dir=str(tmp_path), max_steps=1, use_cpu=True, report_to=[], disable_tqdm=True
    )
    trainer = trl.SFTTrainer(
        torch.compile(_llama(), backend="mst"), settings, train_dataset=data, processing_class=tokenizer
    )
    with mst_fx.watch() as report:
        trainer.train()
    assert _causes(report) == ["nothing-compiled"] and "LlamaForCausalLM" in report.findings[0].evidence


# The estimate


@pytest.mark.slow
@pytest.mark.parametrize("checkpoint", [False, True])
def test_estimate_of_a_step(checkpoint: bool) -> None:
    """Near what eager takes; never less than what mst takes."""
    model = make_llama(Shape(64, 512, 4, 4, 2000, 2), 1024, "cpu", torch.float32, checkpoint=checkpoint)
    ids = text_tokens(1024, 2000)[None]
    kwargs: dict[str, Any] = {"input_ids": ids, "labels": ids}
    compiled = compile_mst(model, {"inner": "aot_eager"})
    with mst_fx.watch() as report:
        compiled(**kwargs).loss.backward()
    weights = sum(parameter.nbytes for parameter in model.parameters())
    peaks = []
    for run in (model, compiled):
        model.zero_grad(set_to_none=True)
        with measure_cpu() as measured:
            run(**kwargs).loss.backward()
        peaks.append(measured.peak_bytes - weights)
    eager, mst = peaks
    assert 0.7 * eager <= report.memory_before.peak <= 1.2 * eager
    assert mst <= report.memory_after.peak <= 0.5 * report.memory_before.peak
    assert "estimate for a step's peak" in str(report)


def test_estimate_without_gradients() -> None:
    model, inputs = ToyLM(layers=1), token_batch(2, LENGTH)
    with torch.no_grad():
        report = report_of(model, OPTIONS, **inputs)
    assert report.memory_before.backward == () and report.memory_after.backward == ()
    logits = 2 * LENGTH * 96 * 8
    assert report.memory_before.peak >= logits > report.memory_after.peak


def test_sizes_that_depend_on_data_do_not_stop_it() -> None:
    def run(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
        return torch.relu(x[x.sum(-1) > 0] @ up) @ down

    with dynamo_config.patch(capture_dynamic_output_shape_ops=True):
        inputs = torch.randn(LENGTH, 16), torch.randn(16, 64, requires_grad=True), torch.randn(64, 16)
        report = report_of(run, OPTIONS, *inputs)
    assert report.graphs == len(report.facts) == 1
    assert "graph 0" in make_page("sizes", report)


def test_no_watcher_no_facts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is gathered in a training run that nobody watches."""
    gathered: list[object] = []

    def estimate(gm: fx.GraphModule, chunk_bytes: object) -> Memory:
        gathered.append(gm)
        return Memory()

    monkeypatch.setattr(watching, "estimate_memory", estimate)
    graph, inputs = torch.fx.symbolic_trace(GatedMLP(16, 64)), [torch.randn(2, LENGTH, 16)]
    with mst_fx.watch() as watched:
        _, report = mst_fx.rewrite(graph, inputs, OPTIONS)
    assert len(gathered) == 2 and len(watched.facts) == 1 and watched.rewrites == report.rewrites
    mst_fx.rewrite(graph, inputs, OPTIONS)
    assert len(gathered) == 2 and len(watched.facts) == 1


# The command

OWN = """
import torch
from tests.diagnose.test_doctor import _batch, _gpt2, _llama

def gpt2():
    return _gpt2(), (), _batch()

def bypassed():
    model = _llama()
    compiled = torch.compile(model, backend="mst")
    return lambda: (compiled, model(**_batch())), (), {}
"""


@pytest.fixture
def own_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "own_cases.py").write_text(OWN)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "own_cases", raising=False)
    return "own_cases"


def _doctor(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert cli.main(["doctor", *arguments]) == 0
    return capsys.readouterr().out


@pytest.mark.slow
def test_doctor_says_cause_and_fix(own_module: str, capsys: pytest.CaptureFixture[str]) -> None:
    out = _doctor(capsys, f"{own_module}:gpt2", "--option", "chunk_rows=16")
    assert "loss-behind-a-break\n" in out and '  fix: model.loss_type = "ForCausalLM"' in out
    assert "nothing in the way" not in out


def test_doctor_runs_a_program_as_it_is(own_module: str, capsys: pytest.CaptureFixture[str]) -> None:
    out = _doctor(capsys, f"{own_module}:bypassed", "--as-is")
    assert "nothing-compiled" in out and "0 graph(s)" in out


@pytest.mark.slow
def test_doctor_finds_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    out = _doctor(capsys, "LlamaForCausalLM", "--seq", "512", "--set", "num_hidden_layers=1")
    assert "nothing in the way was found" in out
