"""Processes of their own, in which something is made once and asked as often as one likes.

Requests and answers are pickled over a pipe. A worker ends when it is stopped, and when the process that started it does.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


class Worker:
    """A new process, and what ``make(*args, **kwargs)`` returns in it; it is called at the first request.

    Args:
        make: at the top level of a module that can be imported, or of the program that runs.
        args, kwargs: what can be pickled, but for what the program that runs has defined itself.
        env: more environment variables. ``LD_PRELOAD`` is not handed on to the processes that it starts.
        log: gets what the process prints.
    """

    def __init__(
        self,
        make: Callable[..., Any],
        *args: Any,
        env: Mapping[str, str] | None = None,
        log: Path | None = None,
        **kwargs: Any,
    ) -> None:
        self._name = make.__qualname__
        self._folder = tempfile.TemporaryDirectory()
        self._log = log or Path(self._folder.name) / "log.txt"
        self._connection, theirs = Pipe()
        path = os.pathsep.join([str(ROOT), *(p for p in sys.path if p)])
        with self._log.open("w") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tools.meters.apart", str(theirs.fileno())],
                env={**os.environ, "PYTHONPATH": path, **(env or {})},
                stdout=output,
                stderr=subprocess.STDOUT,
                pass_fds=(theirs.fileno(),),
                start_new_session=True,  # so that compilers it has started can be stopped with it
            )
        theirs.close()
        self._send(_module_of(make), make.__qualname__, args, kwargs)

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    def ask(self, method: str = "", *args: Any) -> None:
        """Asks for what a method of the object returns; without one, for the object itself."""
        self._send(method, args)

    def answer(self, timeout: float) -> Any:
        """The answer to what was asked first.

        Raises:
            RuntimeError: it failed, or the process ended, or outlasted ``timeout`` seconds; the last line of the
                message says which. The process is stopped.
        """
        if not self._connection.poll(max(timeout, 0.1)):
            raise self._failure(f"took more than {timeout:.0f} s", 5)
        try:
            is_right, found = self._connection.recv()
        except (EOFError, ConnectionError):
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(10)
            raise self._failure(f"ended with status {self._process.poll()}", 30) from None
        if not is_right:
            self.stop()
            raise RuntimeError(f"{self._name} failed:\n{found}")
        return found

    def stop(self) -> None:
        """Once; after that nothing can be asked."""
        if self._connection.closed:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._connection.close()
        self._folder.cleanup()

    def _send(self, *message: Any) -> None:
        with contextlib.suppress(
            ConnectionError
        ):  # whoever waits for the answer is told that the process ended
            self._connection.send(message)

    def _failure(self, message: str, lines: int) -> RuntimeError:
        said = self._log.read_text(errors="replace").splitlines()[-lines:]
        self.stop()
        return RuntimeError("\n".join([*said, f"{self._name} {message}"]))


def call_apart(
    function: Callable[..., Any],
    *args: Any,
    timeout: float = 600,
    env: Mapping[str, str] | None = None,
    **kwargs: Any,
) -> Any:
    """What a function returns in a new process; arguments as of a :class:`Worker`.

    Raises:
        RuntimeError: if the process fails or outlasts ``timeout`` seconds.
    """
    return _once(function, args, kwargs, env or {}, timeout)


def _once(
    function: Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    env: Mapping[str, str],
    timeout: float,
) -> Any:
    """A worker for one call; the tests have forks of a process with all imports in its place."""
    with Worker(function, *args, env=env, **kwargs) as worker:
        worker.ask()
        return worker.answer(timeout)


def _module_of(function: Callable[..., Any]) -> str:
    """The name of a function's module; the path of its file, if it is a file that runs."""
    if function.__module__ != "__main__":
        return function.__module__
    main = sys.modules["__main__"]
    return main.__spec__.name if main.__spec__ else os.path.abspath(main.__file__ or "")


def _load(name: str) -> Any:
    """A module by its name, or by the path of its file."""
    if not name.endswith(".py"):
        return importlib.import_module(name)
    spec = importlib.util.spec_from_file_location(Path(name).stem, name)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def _serve(connection: Connection) -> None:
    """The other end of a :class:`Worker`."""
    os.environ.pop("LD_PRELOAD", None)
    module, name, args, kwargs = connection.recv()
    made: list[Any] = []
    while True:
        try:
            method, arguments = connection.recv()
        except EOFError:
            return
        try:
            if not made:
                found = _load(module)
                for part in name.split("."):
                    found = getattr(found, part)
                made.append(found(*args, **kwargs))
            connection.send((True, getattr(made[0], method)(*arguments) if method else made[0]))
        except Exception:
            connection.send((False, traceback.format_exc()))


if __name__ == "__main__":
    _serve(Connection(int(sys.argv[1])))
