from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings

from mst_fx.diagnose import warn
from tests import apart
from tests.cpu_times import CPUTimes

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

settings.register_profile("short", max_examples=50)
settings.register_profile("long", max_examples=1000)
settings.register_profile("longest", max_examples=10_000)
settings.load_profile("short")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--cpu-times", metavar="FILE", help="write the CPU seconds of each test to FILE")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("cpu_times"):
        config.pluginmanager.register(CPUTimes())


@pytest.fixture(autouse=True, scope="session")
def _forks() -> Iterator[None]:
    """What is called apart, in forks of a process with all imports."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tools.meter.start", apart.start)
        yield
    apart.stop()


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    """Every test starts with the same seed, without compiled code, and with every warning still to be said."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    warn.reset()
    yield
    torch._dynamo.reset()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        skip = pytest.mark.skip(reason="no CUDA device")
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(skip)
