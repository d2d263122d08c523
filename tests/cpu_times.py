"""``pytest --cpu-times=FILE``: the CPU seconds of each test, in JSON lines, and the dearest files at the end.

Of the processor, not of the clock, so that a busy machine and other workers change little. A test's seconds are
those of its process, its threads, the children that it waited for and its forks, in all its phases; a fixture of a module
counts for the first test that asks for it.
"""

from __future__ import annotations

import collections
import json
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import apart

_PROPERTY = "cpu_seconds"


def cpu_seconds() -> float:
    """Of this process, its children and the forks that it asked for, so far."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in used) + apart.cpu_seconds()


class CPUTimes:
    """One in each process; that of the controller hears of all tests."""

    def __init__(self, file: Path | None) -> None:
        """``file`` is what the process writes that hears of all tests, as they end."""
        self._file, self._last = file, cpu_seconds()
        if file is not None:
            file.write_text("")
        self.seconds: dict[str, float] = collections.defaultdict(float)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self) -> Iterator[None]:
        self._last = cpu_seconds()
        return (yield)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self) -> Iterator[None]:
        report: Any = yield
        now = cpu_seconds()
        report.user_properties = [(_PROPERTY, now - self._last)]
        self._last = now
        return report

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.seconds[report.nodeid] += sum(
            value for name, value in report.user_properties if name == _PROPERTY and isinstance(value, float)
        )
        if report.when == "teardown" and self._file is not None:
            line = {"test": report.nodeid, "cpu_s": round(self.seconds[report.nodeid], 3)}
            with self._file.open("a") as out:
                out.write(f"{json.dumps(line)}\n")

    def by_file(self) -> dict[str, float]:
        found: dict[str, float] = collections.defaultdict(float)
        for test, seconds in self.seconds.items():
            found[test.split("::")[0]] += seconds
        return dict(sorted(found.items(), key=lambda item: -item[1]))

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        files = self.by_file()
        terminalreporter.section("CPU seconds")
        for file, seconds in list(files.items())[:10]:
            terminalreporter.line(f"{seconds:8.1f}  {file}")
        tests = sum(files.values())
        terminalreporter.line(f"{tests:8.1f}  all tests; {cpu_seconds():.1f} with imports and collection")
