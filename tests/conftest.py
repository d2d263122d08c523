from __future__ import annotations

import contextlib
import gc
import os
import types
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import settings

from mst_fx import process
from tests import apart, quick
from tests.cpu_times import CPUTimes
from tests.helpers import Sharing
from tests.selection import is_of_a_real_model

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("MST_FX_VERIFY", "1")  # each changed graph, against the spec of mst_fx.graph.verify

quick.compilers()
quick.trace()

settings.register_profile("shortest", max_examples=10)
settings.register_profile("short", max_examples=50)
settings.register_profile("long", max_examples=1000)
settings.register_profile("longest", max_examples=10_000)
settings.load_profile("short")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--cpu-times", metavar="FILE", help="write the CPU seconds of each test to FILE")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("cpu_times"):
        is_worker = hasattr(config, "workerinput")
        config.pluginmanager.register(CPUTimes(None if is_worker else Path(config.getoption("cpu_times"))))


@pytest.fixture(autouse=True, scope="session")
def _forks() -> Iterator[None]:
    """What is called apart, in forks of a process with all imports."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tools.meters.apart._once", apart.once)
        yield
    apart.stop()


@pytest.fixture(autouse=True)
def _fresh(request: pytest.FixtureRequest) -> Iterator[None]:
    """Every test starts with the same seed and with what the process says once still to be said."""
    torch.default_generator.manual_seed(0)
    if (
        torch.cuda.is_available()
    ):  # else torch.manual_seed would remember the stack for each kind of device, 1 ms
        torch.cuda.manual_seed_all(0)
    process.reset()
    marker = request.node.get_closest_marker("shares_compiled")
    with _apart() if marker is None else _shared(request.node.path, **marker.kwargs):
        yield


@pytest.fixture
def no_collections(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before each training accelerate collects the garbage of all that was ever imported, 0.2 s."""
    monkeypatch.setattr("accelerate.utils.memory.gc", types.SimpleNamespace(collect=lambda: 0))


@contextlib.contextmanager
def _apart() -> Iterator[None]:
    """Without compiled code of tests before, and none is left."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@contextlib.contextmanager
def _shared(file: Path, automatic_dynamic: bool = False) -> Iterator[None]:
    """With the compiled code of tests before it in the same file, where Dynamo's guards find that it fits.

    What does not fit is compiled as if it were the first: sizes stay constants (but with ``automatic_dynamic``,
    for tests that all have the same sizes one after the other), and nothing runs in eager because too much was
    compiled.
    """
    if Sharing.file != file:
        torch._dynamo.reset()
    with (
        pytest.MonkeyPatch.context() as patch,
        torch._dynamo.config.patch(
            automatic_dynamic_shapes=automatic_dynamic,
            recompile_limit=1000,
            accumulated_recompile_limit=1000,
            fail_on_recompile_limit_hit=True,
        ),
    ):
        Sharing.file = file
        patch.setattr(Sharing, "now", True)
        yield


def pytest_collection_finish() -> None:
    quick.collections()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> Iterator[None]:
    """Behind the last test of a file nothing of it is left but what stays: caches and imports, which no collection need look at again."""
    yield
    if nextitem is None or nextitem.path != item.path:
        Sharing.file = None
        torch._dynamo.reset()
        process.reset()
        gc.collect()
        gc.freeze()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if is_of_a_real_model(item):
            item.add_marker("real_model")
    if not torch.cuda.is_available():
        skip = pytest.mark.skip(reason="no CUDA device")
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(skip)
