"""Processes of their own for tests that need some, without their imports: forks of a server that has them.

A server is a fresh Python that has imported torch, its compilers and transformers, and has run nothing yet. Each
call is a fork of it: with its own environment, folder, output and process group, ended when it takes too long.
A test process starts a server when it first needs one, with the meter of ``tools.meters.cpu`` loaded, which counts for
the forks that ask it; a call whose ``LD_PRELOAD``, which only counts when a process starts, is another library gets
one more.
"""

from __future__ import annotations

import array
import atexit
import contextlib
import functools
import math
import os
import pickle
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


class _Server:
    def __init__(self, preload: str) -> None:
        ours, theirs = socket.socketpair()
        self._socket = ours
        paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.apart", str(theirs.fileno())],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "LD_PRELOAD": preload},
            pass_fds=[theirs.fileno()],
        )
        theirs.close()

    def call(self, request: dict[str, Any], outputs: Sequence[int], seconds: int) -> int | None:
        """The fork's exit status; None: it was ended because its time was over."""
        data = pickle.dumps(request)
        head = len(data).to_bytes(8, "big") + seconds.to_bytes(8, "big")
        fds = array.array("i", outputs)
        self._socket.sendmsg([head], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, fds)])
        self._socket.sendall(data)
        answer = self._socket.recv(4096)
        if not answer:
            raise RuntimeError(f"the server of forks ended with status {self.process.wait()}")
        return pickle.loads(answer)  # type: ignore[no-any-return]

    def stop(self) -> None:
        self._socket.close()
        self.process.wait()  # which makes its CPU time ours


_servers: dict[str, _Server] = {}


def _server(preload: str | None) -> _Server:
    from tools.meters import cpu

    library = preload or (str(cpu.library_path()) if cpu.is_available() else "")
    if library not in _servers:
        if not _servers:
            atexit.register(stop)
        _servers[library] = _Server(library)
    return _servers[library]


def stop() -> None:
    """Ends all servers of this process."""
    while _servers:
        _servers.popitem()[1].stop()


def cpu_seconds() -> float:
    """Of all servers so far, with the forks that have ended."""
    total = 0
    for server in _servers.values():
        with contextlib.suppress(OSError):
            fields = Path(f"/proc/{server.process.pid}/stat").read_text().rsplit(")", 1)[1].split()
            total += sum(int(field) for field in fields[11:15])
    return total / os.sysconf("SC_CLK_TCK")


def _call(
    function: Callable[..., Any],
    args: Sequence[Any],
    environment: dict[str, str],
    cwd: str | Path,
    outputs: Sequence[int],
    timeout: float,
) -> int:
    request = {"function": function, "args": args, "env": environment, "cwd": str(Path(cwd).resolve())}
    status = _server(environment.get("LD_PRELOAD")).call(request, outputs, math.ceil(timeout))
    if status is None:
        raise subprocess.TimeoutExpired(function.__qualname__, timeout)
    return status


def call(
    function: Callable[..., Any],
    *args: Any,
    env: dict[str, str] | None = None,
    cwd: str | Path = ROOT,
    timeout: float = 300,
) -> subprocess.CompletedProcess[str]:
    """Calls a function of a module in a fork, as ``subprocess.run`` runs a program.

    Args:
        env: the whole environment; None: this process's.

    Raises:
        subprocess.TimeoutExpired: and the fork, with all that it started, was ended.
    """
    environment = dict(os.environ if env is None else env)
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        status = _call(function, args, environment, cwd, [out.fileno(), err.fileno()], timeout)
        out.seek(0)
        err.seek(0)
        return subprocess.CompletedProcess(function.__qualname__, status, out.read(), err.read())


def run_script(path: str | Path, *arguments: str, **how: Any) -> subprocess.CompletedProcess[str]:
    """``python PATH ARGUMENTS``; see :func:`call`."""
    return call(script, str(path), *arguments, **how)


def once(
    function: Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    env: Mapping[str, str],
    timeout: float,
) -> Any:
    """In the place of ``tools.meters.apart._once``: a fork calls the function."""
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result"
        name = function.__qualname__
        with (Path(folder) / "log.txt").open("w+") as log:
            outputs, environment = [log.fileno(), log.fileno()], {**os.environ, **env}
            try:
                request = (function, tuple(args), dict(kwargs), str(result))
                status = _call(_answer, request, environment, ROOT, outputs, timeout)
                message = f"{name} ended with status {status}"
            except subprocess.TimeoutExpired:
                message = f"{name} took more than {timeout:.0f} s"
            log.seek(0)
            said = log.read().splitlines()[-30:]
        if not result.exists():
            raise RuntimeError("\n".join([*said, message]))
        is_right, found = pickle.loads(result.read_bytes())
    if not is_right:
        raise RuntimeError(f"{name} failed:\n{found}")
    return found


def ranks(function: Callable[..., Any], *args: Any, count: int = 2, timeout: float = 600) -> None:
    """Calls ``function(rank, *args)`` in ``count`` processes at once.

    Raises:
        RuntimeError: if one fails, with what it wrote.
    """
    done = call(_ranks, function, args, count, timeout=timeout)
    if done.returncode:
        raise RuntimeError(f"{function.__qualname__} failed:\n{done.stderr[-4000:]}")


def results_of_ranks(
    function: Callable[..., Any], *args: Any, count: int = 2, timeout: float = 600
) -> list[Any]:
    """What ``function(rank, *args)`` returns in each of ``count`` processes, which are a gloo group and have a thread each.

    Raises:
        RuntimeError: if one fails, with what it wrote.
    """
    import torch

    with tempfile.TemporaryDirectory() as folder:
        ranks(_in_group, function, args, count, folder, count=count, timeout=timeout)
        return [torch.load(f"{folder}/{rank}.pt") for rank in range(count)]


# Inside of a fork


def _answer(function: Callable[..., Any], args: Any, kwargs: Any, result: str) -> None:
    """The other end of :func:`once`."""
    try:
        answer = (True, function(*args, **kwargs))
    except Exception:
        answer = (False, traceback.format_exc())
    Path(result).write_bytes(pickle.dumps(answer))


def script(path: str, *arguments: str) -> None:
    """Runs a file as Python does that is given its name; the processes that it spawns are forks, too."""
    import torch.multiprocessing
    from torch.multiprocessing.spawn import start_processes

    torch.multiprocessing.spawn = functools.partial(start_processes, start_method="fork")  # type: ignore[attr-defined]
    sys.argv = [path, *arguments]
    sys.path[0] = str(Path(path).resolve().parent)
    runpy.run_path(path, run_name="__main__")


def _ranks(function: Callable[..., Any], args: tuple[Any, ...], count: int) -> None:
    from torch.multiprocessing.spawn import start_processes

    start_processes(function, args, nprocs=count, start_method="fork")


def _in_group(
    rank: int, function: Callable[..., Any], args: tuple[Any, ...], count: int, folder: str
) -> None:
    """The other end of :func:`results_of_ranks`."""
    import torch
    import torch.distributed

    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{folder}/meeting", rank=rank, world_size=count)
    torch.save(function(rank, *args), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def _run(request: dict[str, Any], outputs: Sequence[int]) -> int:
    """A fork's life; its exit status."""
    os.setsid()  # so that all it starts can be ended with it
    for number, fd in enumerate(outputs, start=1):
        os.dup2(fd, number)
        os.close(fd)
    sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update({name: value for name, value in request["env"].items() if name != "LD_PRELOAD"})
    sys.path[1:1] = [path for path in request["env"].get("PYTHONPATH", "").split(os.pathsep) if path]
    return status_of(request["function"], *request["args"])


def status_of(function: Callable[..., Any], *args: Any) -> int:
    """Calls a function as a process does its program: its exit status, what it raises on stderr."""
    try:
        function(*args)
        return 0
    except SystemExit as end:
        if not isinstance(end.code, (int, type(None))):
            print(end.code, file=sys.stderr)
            return 1
        return end.code or 0
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


def _wait(pid: int, seconds: float) -> int | None:
    """The exit status of a child; None: it took longer, and was ended."""
    watched = os.pidfd_open(pid)
    try:
        in_time = bool(select.select([watched], [], [], seconds)[0])
    finally:
        os.close(watched)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return status if in_time else None


def _serve(connection: socket.socket) -> None:
    import_all()
    while True:
        head, ancillary, *_ = connection.recvmsg(16, socket.CMSG_SPACE(2 * 4))
        if not head:
            return
        outputs = array.array("i", ancillary[0][2]).tolist()
        data, size = b"", int.from_bytes(head[:8], "big")
        while len(data) < size:
            data += connection.recv(size - len(data))
        pid = os.fork()
        if pid == 0:
            connection.close()
            os._exit(_run(pickle.loads(data), outputs))
        for fd in outputs:
            os.close(fd)
        connection.sendall(pickle.dumps(_wait(pid, int.from_bytes(head[8:], "big"))))


def import_all() -> None:
    """What most programs import; nothing that starts threads or reads settings that a fork could change."""
    import networkx  # noqa: F401
    import torch
    import torch._dynamo.backends.debugging
    import torch._functorch.aot_autograd
    import torch._inductor.compile_fx
    import torch.distributed
    import torch.fx.experimental.proxy_tensor
    from torch._inductor.fx_passes import joint_graph, post_grad

    with contextlib.suppress(ImportError):
        import transformers.masking_utils
        import transformers.models.llama.modeling_llama  # noqa: F401
    from tests import quick

    quick.compilers()
    joint_graph.lazy_init(torch.device("cpu"))  # patterns, 0.5 s in each process that runs Inductor
    post_grad.lazy_init()
    torch.set_num_threads(1)
    quick.collections()


if __name__ == "__main__":
    _serve(socket.socket(fileno=int(sys.argv[1])))
    os._exit(0)
