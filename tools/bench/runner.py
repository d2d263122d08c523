"""One contender on one case: builds, warms up, measures, and holds no parameters while others have their turn."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tools.bench.contenders import (
    Contender,
    block,
    compiled,
    expert_block,
    loss_function,
    make_model,
)
from tools.bench.models import config_of, text_tokens
from tools.meters.gpu import describe_peak, kernel_table


@dataclasses.dataclass(frozen=True)
class Case:
    """What all contenders of a table run.

    Attributes:
        level: "model", "mlp", "experts" or "head".
        model: of :data:`tools.bench.models.MODELS`.
        seq: tokens; rows of a block.
        window: of a sliding window, 0: none.
        documents: tokens of each packed document, 0: one document.
        lora: rank of LoRA, 0: all parameters train.
        lora_dropout: of the adapters' inputs, in [0, 1).
    """

    level: str
    model: str
    layers: int
    seq: int
    window: int = 0
    documents: int = 0
    lora: int = 0
    lora_dropout: float = 0.0
    device: str = "cuda"

    @property
    def overrides(self) -> dict[str, Any]:
        window = {"sliding_window": self.window} if self.window else {}
        return {"num_hidden_layers": self.layers, **window}

    @property
    def adapters(self) -> dict[str, Any]:
        return {"lora": self.lora, "lora_dropout": self.lora_dropout}


class _Parameters:
    """The parameters of a model, which can be let go and made anew."""

    def __init__(self, module: nn.Module) -> None:
        self._tensors = [p.data for p in module.parameters()]
        self._bytes = [p.untyped_storage().nbytes() for p in self._tensors]
        # Norms and biases are constants.
        self._constants = [float(p.flatten()[0]) if p.ndim == 1 else None for p in self._tensors]

    def drop(self) -> None:
        for tensor in self._tensors:
            tensor.untyped_storage().resize_(0)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def make(self) -> None:
        torch.manual_seed(0)
        for tensor, size, constant in zip(self._tensors, self._bytes, self._constants, strict=True):
            tensor.untyped_storage().resize_(size)
            if constant is None:
                tensor.normal_(std=0.02)
            else:
                tensor.fill_(constant)


class Runner:
    """One contender: builds, warms up, measures."""

    def __init__(self, contender: Contender, case: Case) -> None:
        self._on_gpu = case.device == "cuda"
        if case.level == "model":
            self._model = make_model(
                case.model, contender, case.seq, case.device, **case.adapters, **case.overrides
            )
            self._step = self._training_step(contender, case)
        else:
            config = config_of(case.model, case.seq)
            if case.level == "experts":
                self._model = expert_block(case.model, contender, case.seq, case.device)
            else:
                wide = config.intermediate_size if case.level == "mlp" else config.vocab_size
                self._model = block(case.level, contender, config.hidden_size, wide, case.device)
            self._step = self._block_step(contender, case, config.hidden_size)
        self._parameters = _Parameters(self._model)
        self._leaves: list[Tensor] = list(self._model.parameters())

    def _training_step(self, contender: Contender, case: Case) -> Callable[[], Tensor]:
        loss = loss_function(self._model, contender)
        vocabulary = self._model.config.vocab_size  # type: ignore[union-attr]
        ids = text_tokens(case.seq, int(vocabulary)).view(1, case.seq).to(case.device)  # type: ignore[arg-type]
        more = {}
        if case.documents:
            more["position_ids"] = torch.arange(case.seq, device=case.device)[None] % case.documents

        def step() -> Tensor:
            found = loss(ids, **more)
            torch.autograd.backward(found)
            return found.detach()

        return step

    def _block_step(self, contender: Contender, case: Case, hidden: int) -> Callable[[], Tensor]:
        dtype = next(self._model.parameters()).dtype
        generator = torch.Generator(case.device).manual_seed(1)
        shape, options = (1, case.seq, hidden), {"device": case.device, "generator": generator}
        x = torch.randn(shape, dtype=dtype, **options).requires_grad_()  # type: ignore[call-overload]
        self._x = x
        run = compiled(self._model, contender)
        if case.level == "head":
            vocabulary = config_of(case.model, case.seq).vocab_size
            labels = torch.randint(vocabulary, (1, case.seq), **options)  # type: ignore[call-overload]

            def head_step() -> Tensor:
                x.grad = None
                loss: Tensor = run(x, labels)
                torch.autograd.backward(loss)
                return loss.detach()

            return head_step
        tangent = torch.randn(shape, dtype=dtype, **options)  # type: ignore[call-overload]

        def mlp_step() -> Tensor:
            x.grad = None
            out = run(x)
            out.backward(tangent)
            return torch.linalg.vector_norm(out.detach(), dtype=torch.float32)  # a check, not a loss

        return mlp_step

    def warm_up(self) -> dict[str, Any]:
        self._parameters.make()
        start = time.perf_counter()
        loss = self._once()
        first = time.perf_counter() - start
        norms = torch.stack(
            [
                torch.linalg.vector_norm(p.grad, dtype=torch.float32)
                for p in self._leaves
                if p.grad is not None
            ]
        )
        found = {
            "first_step_seconds": first,
            "loss": float(loss),
            "gradient_norm": float(torch.linalg.vector_norm(norms)),
            "parameter_bytes": sum(p.nbytes for p in self._leaves),
            "gradient_bytes": sum(p.grad.nbytes for p in self._leaves if p.grad is not None),
        }
        self.park()
        return found

    def park(self) -> None:
        self._model.zero_grad(set_to_none=True)
        if hasattr(self, "_x"):
            self._x.grad = None
        self._parameters.drop()

    def turn(self, steps: int) -> list[dict[str, float]]:
        self._parameters.make()
        self._once()
        found = []
        for _ in range(steps):
            self._model.zero_grad(set_to_none=True)
            base = 0
            if self._on_gpu:
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
                base = torch.cuda.memory_allocated()
            start = time.perf_counter()
            self._once()
            seconds = time.perf_counter() - start
            peak = torch.cuda.max_memory_allocated() if self._on_gpu else 0
            found.append({"seconds": seconds, "peak_bytes": peak, "before_bytes": base})
        self.park()
        return found

    def profile(self, kind: str) -> str:
        """What runs (``kind`` "kernels"), or what is alive at the peak ("alive")."""
        self._parameters.make()
        self._once()
        self._model.zero_grad(set_to_none=True)
        text = kernel_table(self._once) if kind == "kernels" else describe_peak(self._once)
        self.park()
        return text

    def _once(self) -> Tensor:
        loss = self._step()
        if self._on_gpu:
            torch.cuda.synchronize()
        return loss


def make_runner(contender: Contender, case: Case) -> Runner:
    """In a process of its own, which prints what mst-fx logs."""
    logging.basicConfig()
    logging.getLogger("mst_fx").setLevel(logging.INFO)
    return Runner(contender, case)
