"""A user's own function, by name: found, called, and what it raises told apart from what we raise."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from mst_fx.diagnose.configs import one_line
from mst_fx.errors import ProgramError, SubjectError, did_you_mean

# Whose frames are not the user's.
_OTHERS = (
    *(str(Path(module.__file__ or "").parent) for module in (importlib, torch)),
    str(Path(__file__).parents[1]),
    "<frozen ",
)

Program = tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]


def call_of(name: str, given: Mapping[str, Any]) -> Program:
    """What a user's function returns: a function or module, its args and its kwargs.

    Args:
        name: ``module:function``, with a module that is found as ``python -m`` would find it, or ``file.py:function``.
        given: what the user said on the command line; the function gets it by name.

    Raises:
        SubjectError: there is no such function, it does not take what is given, or returns something else.
        ProgramError: it raised, or its module did.
    """
    place, _, function_name = name.rpartition(":")
    module = _module(place)
    function = getattr(module, function_name, None)
    if not callable(function):
        raise SubjectError(
            f"{place!r} has no function {function_name!r}{did_you_mean(function_name, vars(module))}"
        )
    _check_arguments(name, function, given)
    try:
        made = function(**given)
    except Exception as error:
        raise ProgramError(said_of(name, error)) from error
    return _checked(name, made)


def said_of(name: str, error: BaseException) -> str:
    """What a user's own code raised, and where, in a sentence."""
    if isinstance(error, SyntaxError) and error.filename:
        return f"{name}: {one_line(error)}"
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not frame.filename.startswith(_OTHERS) and frame.lineno
    ]
    place = f"{frames[-1].filename}:{frames[-1].lineno} in {frames[-1].name}; " if frames else ""
    return f"{name} raised {one_line(error)} ({place}--verbose shows the whole trace)"


def _module(place: str) -> ModuleType:
    path = Path(place)
    if place.endswith(".py"):
        if not path.is_file():
            raise SubjectError(f"there is no file {place}")
        return _imported(place, lambda: _load(path))
    if "" not in sys.path:
        sys.path.insert(0, "")
    if "/" in place:
        raise SubjectError(f"{place!r} is no module; a file is given as file.py:function")
    return _imported(place, lambda: importlib.import_module(place))


def _imported(place: str, load: Callable[[], ModuleType]) -> ModuleType:
    try:
        return load()
    except ModuleNotFoundError as error:
        if error.name is not None and f"{place}.".startswith(f"{error.name}."):
            raise SubjectError(f"cannot import {place!r}: {error}") from error
        raise ProgramError(said_of(f"importing {place}", error)) from error
    except Exception as error:
        raise ProgramError(said_of(f"importing {place}", error)) from error


def _load(path: Path) -> ModuleType:
    """A file as a module, with its folder on the path, as of a script."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    sys.path.insert(0, str(path.resolve().parent))
    spec.loader.exec_module(module)
    return module


def _check_arguments(name: str, function: Callable[..., Any], given: Mapping[str, Any]) -> None:
    """
    Raises:
        SubjectError: the function's signature does not fit.
    """
    parameters = inspect.signature(function).parameters.values()
    if not any(p.kind is p.VAR_KEYWORD for p in parameters):
        names = [p.name for p in parameters]
        for each in given:
            if each not in names:
                raise SubjectError(
                    f"{name} has no parameter {each!r}, so that what was given of it would be ignored"
                    f"{did_you_mean(each, names)}"
                )
    missing = [
        p.name
        for p in parameters
        if p.default is p.empty and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
    ]
    missing = [each for each in missing if each not in given]
    if missing:
        raise SubjectError(
            f"{name} needs {', '.join(missing)}: --seq, --batch, --dtype, --checkpointing or --set NAME=VALUE"
        )


def _checked(name: str, made: Any) -> Program:
    wanted = f"{name} must return (fn_or_module, args, kwargs)"
    if not isinstance(made, tuple) or len(made) != 3:
        what = f"a tuple of {len(made)}" if isinstance(made, tuple) else type(made).__name__
        raise SubjectError(f"{wanted}, not {what}")
    fn, args, kwargs = made
    if not callable(fn):
        raise SubjectError(f"{wanted}: the first is {_named(fn)}, which cannot be called")
    if not isinstance(args, (tuple, list)):
        raise SubjectError(f"{wanted}: args is {_named(args)}, not a tuple; of one argument (x,)")
    if not isinstance(kwargs, Mapping):
        raise SubjectError(f"{wanted}: kwargs is {_named(kwargs)}, not a dict; of none {{}}")
    return fn, tuple(args), dict(kwargs)


def _named(value: Any) -> str:
    return "None" if value is None else f"of type {type(value).__name__}"
