"""Attention with sinks, windows and biases, forward and backward: mst's beside the same kernel without them and beside FlexAttention.

    python -m tools.bench.attention                                        # gpt-oss's heads, 32K tokens
    python -m tools.bench.attention --window 128
    python -m tools.bench.attention --heads 32 --kv-heads 32 --width 128 --seq 8192 --ways sdpa,alibi,flex-alibi
    python -m tools.bench.attention --seq 512 --heads 4 --kv-heads 2       # a small size that runs on a CPU

``sdpa`` is torch's ``scaled_dot_product_attention``, ``sinks`` and ``alibi`` are written out as transformers' eager attention does
(gpt-oss, Bloom), ``flex-…`` is torch's ``flex_attention`` with the same meaning. All but flex are compiled with ``backend="mst"``. The ways take
turns; a figure is the median of a way's steps. Errors are those of the output and of every gradient against float64 at 2,048 tokens.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, create_block_mask, flex_attention

import mst_fx
from tools.bench.tables import MIB, markdown_table, write_results

_TOKENS_OF_TRUTH = 2048  # more than a chunk of the scores on a GPU: fewer are left as they are

Attention = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""Query ``[1, h, S, D]``, key and value ``[1, g, S, D]``, numbers of heads ``[h]`` (sinks, slopes) → ``[1, h, S, D]``."""


def _visible(size: int, window: int, device: torch.device) -> Tensor:
    place = torch.arange(size, device=device)
    distance = place[:, None] - place
    found = distance >= 0
    return found & (distance < window) if window else found


def _sdpa(query: Tensor, key: Tensor, value: Tensor, _: Tensor, *, window: int) -> Tensor:
    mask = _visible(query.shape[2], window, query.device) if window else None
    groups = query.shape[1] // key.shape[1]
    return F.scaled_dot_product_attention(
        query, key, value, mask, is_causal=not window, enable_gqa=groups > 1
    )


def _scores(query: Tensor, key: Tensor, window: int) -> Tensor:
    groups, size = query.shape[1] // key.shape[1], query.shape[2]
    scores = query @ key.repeat_interleave(groups, 1).transpose(2, 3) * query.shape[3] ** -0.5
    least = torch.finfo(query.dtype).min
    mask = torch.zeros((), dtype=query.dtype, device=query.device).where(
        _visible(size, window, query.device), least
    )
    return scores + mask


def _sinks(query: Tensor, key: Tensor, value: Tensor, sinks: Tensor, *, window: int) -> Tensor:
    scores = _scores(query, key, window)
    column = sinks.reshape(1, -1, 1, 1).expand(query.shape[0], -1, query.shape[2], -1)
    both = torch.cat([scores, column], -1)
    both = both - both.max(-1, keepdim=True).values
    weights = F.softmax(both, -1, dtype=both.dtype)[..., :-1]
    return weights @ value.repeat_interleave(query.shape[1] // key.shape[1], 1)


def _alibi(query: Tensor, key: Tensor, value: Tensor, slopes: Tensor, *, window: int) -> Tensor:
    places = torch.arange(key.shape[2], device=query.device).to(query.dtype)
    scores = _scores(query, key, window) + (slopes.detach()[:, None] * places)[None, :, None]
    weights = F.softmax(scores, -1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(query.dtype)
    return weights @ value.repeat_interleave(query.shape[1] // key.shape[1], 1)


def _flex(window: int, size: int, device: str, *, alibi: bool = False) -> Attention:
    def shows(_b: Tensor, _h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (q >= k) & (q - k < window) if window else q >= k

    blocks = create_block_mask(shows, None, None, size, size, device=device)
    compiled: Any = torch.compile(flex_attention, dynamic=False)

    def attend(query: Tensor, key: Tensor, value: Tensor, numbers: Tensor) -> Tensor:
        groups = query.shape[1] // key.shape[1]
        more: dict[str, Any] = {"block_mask": blocks, "enable_gqa": groups > 1}
        if alibi:
            slopes = numbers.detach()

            def biased(score: Tensor, _b: Tensor, h: Tensor, _q: Tensor, k: Tensor) -> Tensor:
                return score + slopes[h] * k

            return compiled(query, key, value, score_mod=biased, **more)  # type: ignore[no-any-return]
        out, aux = compiled(query, key, value, return_aux=AuxRequest(lse=True), **more)
        keep = torch.sigmoid(aux.lse - numbers.view(1, -1, 1)).unsqueeze(-1)
        return (out * keep).to(query.dtype)  # type: ignore[no-any-return]

    return attend


_WRITTEN = {"sdpa": _sdpa, "sinks": _sinks, "alibi": _alibi}
_FLEX = {"flex-sinks": False, "flex-alibi": True}


def attention_of(way: str, size: int, window: int, device: str) -> Attention:
    """A way's function, compiled."""
    if way in _FLEX:
        return _flex(window, size, device, alibi=_FLEX[way])
    written = _WRITTEN[way]

    def attend(query: Tensor, key: Tensor, value: Tensor, numbers: Tensor) -> Tensor:
        return written(query, key, value, numbers, window=window)

    return torch.compile(attend, backend="mst", dynamic=False)  # type: ignore[call-overload, no-any-return]


def operands_of(
    arguments: argparse.Namespace, size: int, device: str, dtype: torch.dtype
) -> tuple[list[Tensor], Tensor]:
    """Query, key, value and numbers of heads, which want gradients, and a tangent; random, seed 0."""
    torch.manual_seed(0)
    shapes = [(1, size, heads, arguments.width) for heads in (arguments.heads, *[arguments.kv_heads] * 2)]
    made = [torch.randn(*shape, device=device, dtype=dtype).transpose(1, 2) for shape in shapes]
    made.append(-torch.rand(arguments.heads, device=device, dtype=dtype))
    return [x.requires_grad_() for x in made], torch.randn_like(made[0])


def _step(attend: Attention, operands: list[Tensor], tangent: Tensor) -> list[Tensor]:
    out = attend(*operands)
    found = torch.autograd.grad(out, operands, tangent, allow_unused=True)
    return [out.detach(), *(x for x in found if x is not None)]


def errors_of(way: str, arguments: argparse.Namespace, device: str, dtype: torch.dtype) -> list[float]:
    """Of the output and of each gradient, ``‖x - truth‖ / ‖truth‖``.

    Raises:
        RuntimeError: mst left the attention as it is.
    """
    size = _TOKENS_OF_TRUTH
    operands, tangent = operands_of(arguments, size, device, dtype)
    wide = [x.detach().double().requires_grad_() for x in operands]
    written = _WRITTEN[way.removeprefix("flex-")]
    truth = _step(
        lambda *given: written(*given, window=arguments.window),  # type: ignore[operator]
        wide,
        tangent.double(),
    )
    with mst_fx.watch() as report:
        found = _step(attention_of(way, size, arguments.window, device), operands, tangent)
    if way in ("sinks", "alibi") and not report.rewrites:
        raise RuntimeError(f"{way} is not rewritten: {report.refusals}")
    return [float((a.double() - b).norm() / b.norm()) for a, b in zip(found, truth, strict=True)]


def measure(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    on_gpu = torch.cuda.is_available()
    device, dtype = ("cuda", torch.bfloat16) if on_gpu else ("cpu", torch.float32)
    results = []
    for way in arguments.ways.split(","):
        results.append({"way": way, "errors": errors_of(way, arguments, device, dtype), "ms": [], "peak": 0})
        torch.compiler.reset()
    operands, tangent = operands_of(arguments, arguments.seq, device, dtype)
    ways = [attention_of(r["way"], arguments.seq, arguments.window, device) for r in results]  # type: ignore[arg-type]
    for turn in range(arguments.rounds + 1):
        for result, attend in zip(results, ways, strict=True):
            for step in range(arguments.steps + 1):
                before = 0
                if on_gpu:
                    torch.cuda.synchronize()
                    torch.cuda.reset_peak_memory_stats()
                    before = torch.cuda.memory_allocated()
                start = time.perf_counter()
                _step(attend, operands, tangent)
                if on_gpu:
                    torch.cuda.synchronize()
                    result["peak"] = torch.cuda.max_memory_allocated() - before
                if turn and step:
                    result["ms"].append(1e3 * (time.perf_counter() - start))  # type: ignore[union-attr]
    shape = {key: getattr(arguments, key) for key in ("seq", "heads", "kv_heads", "width", "window")}
    return [{**result, **shape, "median_ms": statistics.median(result["ms"])} for result in results]  # type: ignore[arg-type]


def table(results: list[dict[str, Any]]) -> str:
    """A line a way; ratios against the first one."""
    lines: list[Any] = [
        ("way", "ms", f"of {results[0]['way']}", "peak above inputs MiB", "errors: output, gradients")
    ]
    for r in results:
        ratio = r["median_ms"] / results[0]["median_ms"]
        errors = " ".join(f"{error:.1e}" for error in r["errors"])
        lines.append((r["way"], f"{r['median_ms']:.2f}", f"{ratio:.3f}", f"{r['peak'] / MIB:.0f}", errors))
    first = results[0]
    window = f", window {first['window']}" if first["window"] else ""
    title = f"### {first['seq']:,} tokens, {first['heads']} heads, {first['kv_heads']} of keys, {first['width']} wide"
    return f"{title}{window}\n\n{markdown_table(lines)}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--seq", type=int, default=32768)
    add("--heads", type=int, default=64)
    add("--kv-heads", type=int, default=8)
    add("--width", type=int, default=64)
    add("--window", type=int, default=0, help="keys that a query sees, itself among them; 0: all before it")
    add("--ways", default="sdpa,sinks,flex-sinks", help=f"of {', '.join([*_WRITTEN, *_FLEX])}")
    add("--rounds", type=int, default=3)
    add("--steps", type=int, default=5, help="steps of a turn that count")
    add("--out", type=Path, default=Path("bench-out"))
    add("--name", default="attention", help="of the files with the results")
    arguments = parser.parse_args()
    results = measure(arguments)
    text = table(results)
    write_results(arguments.out, arguments.name, results, text)
    print(text)


if __name__ == "__main__":
    main()
