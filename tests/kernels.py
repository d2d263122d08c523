"""All C++ kernels of a graph in one library, compiled when the first of them runs.

Inductor makes a library of each kernel, and most of a small kernel's 0.75 s goes into what they have in common: torch's headers, those
of Python, the linker. Together, they take 0.5 s a graph and 0.1 s a kernel; those that never run take nothing.

The kernels' source stays as it is but for its name. Three names of torch: ``AsyncCompile.cpp_pybinding``, which gets the source of
each kernel while a graph's module is loaded, ``CppCodeCache``, which compiles a library once, also for other processes, and
``_get_optimization_cflags``, the compiler's flags.
"""

from __future__ import annotations

import ctypes
import functools
import re
from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch._inductor import cpp_builder
from torch._inductor.async_compile import AsyncCompile
from torch._inductor.codecache import CppCodeCache, CppPythonBindingsCodeCache

_START = re.compile(r'\A(\s*(?:#include [^\n]*\n\s*)*extern "C"\s+void\s+kernel)\(')
_NUMBERS: dict[str, Any] = {"int64_t": ctypes.c_int64, "float": ctypes.c_float, "double": ctypes.c_double}


def together() -> None:
    """For all that Inductor compiles in this process from now on."""
    alone = AsyncCompile.cpp_pybinding

    def cpp_pybinding(self: AsyncCompile, argtypes: list[str], source_code: str) -> Any:
        types = [_type_of(name) for name in argtypes]
        if None in types or not _START.match(source_code):
            return alone(self, argtypes, source_code)
        library = self.__dict__.setdefault("_library", _Library())
        return library.add(argtypes, types, source_code)

    AsyncCompile.cpp_pybinding = cpp_pybinding  # type: ignore[method-assign]
    _less_optimized()


def _less_optimized() -> None:
    """Without what takes longer than it saves: 0.15 s of 0.8 s for ten kernels.

    No number depends on it: Inductor lets the compiler change none (``-fno-unsafe-math-optimizations -ffp-contract=off``).
    """
    full = cpp_builder._get_optimization_cflags

    def flags(*args: Any, **kwargs: Any) -> tuple[list[str], list[str]]:
        compiler, linker = full(*args, **kwargs)
        return [flag.replace("O3", "O1") for flag in compiler if flag != "g1"], linker

    cpp_builder._get_optimization_cflags = flags


def _type_of(name: str) -> Any:
    """As ctypes has it; None: unknown."""
    return ctypes.c_void_p if name.endswith("*") else _NUMBERS.get(name.removeprefix("const "))


class _Compiled(CppCodeCache):
    cache: dict[str, Callable[[], Any]] = {}  # noqa: RUF012
    cpp_compile_command_flags = CppPythonBindingsCodeCache.cpp_compile_command_flags

    @classmethod
    def _get_uncompiled_header(cls, device: str) -> str | None:
        return CppPythonBindingsCodeCache._get_uncompiled_header(device)


class _Library:
    """The kernels of one module."""

    def __init__(self) -> None:
        self._sources: list[str] = []

    def add(self, names: list[str], types: list[Any], source: str) -> Callable[..., None]:
        """A function that calls the kernel, given tensors and numbers.

        It raises RuntimeError with what the kernel has thrown, as Inductor's own bindings do.
        """
        number = len(self._sources)
        parameters = ", ".join(f"{name} a{i}" for i, name in enumerate(names))
        arguments = ", ".join(f"a{i}" for i in range(len(names)))
        renamed = _START.sub(lambda start: f"{start[1]}_{number}(", source)
        self._sources.append(f"""{renamed}
extern "C" const char* call_{number}({parameters}) {{
    thread_local std::string said;
    try {{ kernel_{number}({arguments}); return nullptr; }}
    catch (std::exception const& e) {{ said = e.what(); return said.c_str(); }}
}}
""")
        return functools.partial(self._call, number, types)

    def _call(self, number: int, types: list[Any], *args: Any) -> None:
        said = self._function(number, tuple(types))(
            *(a.data_ptr() if isinstance(a, Tensor) else a for a in args)
        )
        if said is not None:
            raise RuntimeError(said.decode())

    @functools.cached_property
    def _functions(self) -> Any:
        return _Compiled.load("#include <exception>\n#include <string>\n" + "\n".join(self._sources))

    @functools.cache  # noqa: B019
    def _function(self, number: int, types: tuple[Any, ...]) -> Any:
        function = self._functions[f"call_{number}"]
        function.argtypes, function.restype = types, ctypes.c_char_p
        return function
