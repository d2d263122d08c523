"""Private parts of torch are used in ``mst_fx/torch_api`` alone: what an AST shows of it, with no exceptions.

Private is a module or name of torch with a ``_`` in front, ``torch.fx.experimental``, and what objects of such classes have
(``SymInt.node.expr``). An ATen operator with a ``_`` may be named, since graphs have it, and not be called.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

_ROOT = Path(__file__).parents[2]
_ROOM = _ROOT / "mst_fx" / "torch_api"

# Attributes without a ``_`` that only objects of private classes have: SymNode, ShapeEnv, FakeTensor, GraphModules of Dynamo.
_INNER = {
    *("shape_env", "guard_int", "guard_float", "guard_bool", "guard_size_oblivious", "guard_or_false"),
    *("bound_sympy", "tracked_fakes", "var_to_val", "backed_var_to_val", "var_to_range", "replacements"),
    *("fake_mode", "fake_device", "compile_subgraph_reason", "fw_metadata"),
}
_OF_NODE = {"expr", "hint", "constant", "has_hint", "maybe_as_int", "pytype"}  # ``size.node.expr``
# Private ones of torch's objects that must not hide behind a name of ours.
_ALWAYS = {
    *("_cdata", "_expr", "_schema", "_version", "_base", "_typed_storage", "_orig_mod", "_overloadname"),
    *(
        "_backward_hooks",
        "_parameters",
        "_buffers",
        "_modules",
        "_dynamo",
        "_saved_tensors",
        "_raw_saved_tensors",
    ),
}

_LIBRARIES = ("transformers",)  # a parameter of that name is the library: it may not be imported


def _files() -> list[Path]:
    files = [*(_ROOT / "mst_fx").rglob("*.py"), *(_ROOT / "passes").rglob("*.py")]
    return sorted({f.resolve() for f in files if _ROOM not in f.parents})


def _is_private(part: str) -> bool:
    return part.startswith("_") and not part.endswith("__")


def _is_private_path(path: str) -> bool:
    return any(map(_is_private, path.split("."))) or f"{path}.".startswith("torch.fx.experimental.")


def _own_attributes(tree: ast.Module) -> set[str]:
    """The attributes that the classes of a file define."""
    found: set[str] = set()
    for scope in (node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)):
        for each in scope.body:
            targets = each.targets if isinstance(each, ast.Assign) else [getattr(each, "target", None)]
            found |= {target.id for target in targets if isinstance(target, ast.Name)}
            found |= {each.name} if isinstance(each, ast.FunctionDef) else set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            found |= {node.attr} if ast.unparse(node.value) == "self" else set()
    return found - _ALWAYS


class _Names(ast.NodeVisitor):
    """Private uses of torch in one file, as (line, text)."""

    def __init__(self, own: set[str]) -> None:
        self.own = own
        self.paths: dict[str, str] = {}  # what the names of the file stand for
        self.found: list[tuple[int, str]] = []

    def visit_Import(self, node: ast.Import) -> None:
        for alias in node.names:
            self.paths[alias.asname or alias.name.partition(".")[0]] = (
                alias.name if alias.asname else alias.name.partition(".")[0]
            )
            self._check_import(node, alias.name)

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        for alias in node.names:
            path = f"{node.module}.{alias.name}"
            self.paths[alias.asname or alias.name] = path
            self._check_import(node, path)

    def _check_import(self, node: ast.stmt, path: str) -> None:
        if path.partition(".")[0] in ("torch", "functorch") and _is_private_path(path):
            self.found.append((node.lineno, f"import of {path}"))

    def visit_Assign(self, node: ast.Assign) -> None:
        path = self._path(node.value)
        for target in node.targets:
            if path is not None and isinstance(target, ast.Name):
                self.paths[target.id] = path  # aten = torch.ops.aten
        self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        path = self._path(node.func) or ""
        if path.startswith("torch.ops.") and any(map(_is_private, path.split("."))):
            self.found.append((node.lineno, f"call of {path}"))
        if path in ("getattr", "hasattr", "setattr") and len(node.args) > 1:
            name = node.args[1].value if isinstance(node.args[1], ast.Constant) else None
            if isinstance(name, str):
                self._check_attribute(node, name, node.args[0])
        self.generic_visit(node)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        path = self._path(node)
        if path is not None and path.startswith("torch.ops."):
            return
        if path is not None and path.startswith("torch."):
            if _is_private_path(path):
                self.found.append((node.lineno, path))
            return
        self._check_attribute(node, node.attr, node.value)
        self.generic_visit(node)

    def visit_Constant(self, node: ast.Constant) -> None:
        path = node.value if isinstance(node.value, str) else ""
        if re.fullmatch(r"torch(\.\w+)+", path) and _is_private_path(path):
            self.found.append((node.lineno, f'"{path}"'))

    def _check_attribute(self, node: ast.expr, name: str, of: ast.expr) -> None:
        is_foreign = _is_private(name) and name not in self.own and not self._is_of_others(of)
        is_of_node = name in _OF_NODE and isinstance(of, ast.Attribute) and of.attr == "node"
        if is_foreign or is_of_node or name in _INNER:
            self.found.append((node.lineno, f"{ast.unparse(of)}.{name}"))

    def _path(self, node: ast.expr) -> str | None:
        """``F.linear`` → ``torch.nn.functional.linear``; None for what is no dotted name."""
        if isinstance(node, ast.Name):
            return self.paths.get(node.id, node.id)
        if isinstance(node, ast.Attribute) and (path := self._path(node.value)) is not None:
            return f"{path}.{node.attr}"
        return None

    def _is_of_others(self, node: ast.expr) -> bool:
        """Whether something comes from a library that is neither torch nor ours, by its name in the file."""
        while not isinstance(node, ast.Name):
            if isinstance(node, ast.Attribute):
                node = node.value
            elif isinstance(node, ast.Call) and node.args and ast.unparse(node.func) == "getattr":
                node = node.args[0]
            else:
                return False
        library = self.paths.get(node.id, "" if node.id not in _LIBRARIES else node.id).partition(".")[0]
        return library not in ("", "torch", "functorch", "mst_fx")


def private_uses(source: str, own: set[str]) -> list[tuple[int, str]]:
    names = _Names(own)
    names.visit(ast.parse(source))
    return names.found


def test_torch_api_alone_uses_private_parts_of_torch() -> None:
    sources = {path: path.read_text() for path in _files()}
    own = {name for source in sources.values() for name in _own_attributes(ast.parse(source))}
    found = [
        f"{path.relative_to(_ROOT)}:{line}: {text}"
        for path, source in sources.items()
        for line, text in private_uses(source, own)
    ]
    assert len(sources) > 40
    assert not found, "\n".join(found)


_HEAD = "import sys\nimport torch\nimport transformers\nfrom torch import fx\naten = torch.ops.aten\n"


@pytest.mark.parametrize(
    "line",
    [
        "import torch._dynamo",
        "import torch._dynamo.config as config",
        "from torch._subclasses.fake_tensor import FakeTensor",
        "from torch.utils import _pytree",
        "from torch.utils._pytree import tree_leaves",
        "from torch.fx.experimental import symbolic_shapes",
        "from torch.fx.experimental.proxy_tensor import make_fx",
        "from torch import _guards as guards",
        "x = torch._C._set_grad_enabled",
        "x = torch.amp.autocast_mode._enter_autocast",
        "x = fx.experimental.proxy_tensor",
        "torch.Tensor._make_wrapper_subclass(y, 3)",
        "c = torch._C\nx = c.thing",
        "aten._flash_attention_forward(y)",
        "torch.ops.aten._to_copy.default(y)",
        "x = y.untyped_storage()._cdata",
        "x = [each._schema for each in y]",
        "x = y().node.expr",
        "x = y.node.hint",
        "x = y.node.shape_env.guards",
        "x = y.guard_float('', 0)",
        "with y.fake_mode: pass",
        "x = y.grad_fn._saved_self",
        "x = getattr(y, '_schema', None)",
        "x = getattr(y, 'compile_subgraph_reason', None)",
        "x = 'torch._subclasses.fake_tensor'",
        "def f():\n    from torch._higher_order_ops import wrap",
        "x: torch._ops.OpOverload",
    ],
)
def test_private_use_is_seen(line: str) -> None:
    assert private_uses(_HEAD + line, {"_mine"})


@pytest.mark.parametrize(
    "line",
    [
        "x = aten._to_copy.default",
        "table = {aten._softmax.default: 1}",
        "x = y._mine",
        "x = self.node.meta",
        "x = y.node.target",
        "x = torch.Tensor.__getitem__",
        "x = sys._getframe(1)",
        "x = getattr(transformers, y)._model_mapping",
        "x = 'set torch._dynamo.config.optimize_ddp = False'",
        "torch.compiler.reset()",
        "from torch.utils.checkpoint import checkpoint",
    ],
)
def test_public_use_is_not(line: str) -> None:
    assert not private_uses(_HEAD + line, {"_mine"})


def _modules_of_the_room() -> Iterator[tuple[str, ast.Module]]:
    for path in sorted(_ROOM.glob("*.py")):
        yield path.stem, ast.parse(path.read_text())


def test_torch_api_says_why_and_with_which_versions() -> None:
    for name, tree in _modules_of_the_room():
        said = ast.get_docstring(tree) or ""
        assert name == "__init__" or re.search(r"Tried with torch 2\.11\S* .*and 2\.13", said, re.DOTALL), (
            name
        )
        bare = [
            node.name
            for node in tree.body
            if isinstance(node, (ast.FunctionDef, ast.ClassDef))
            and not _is_private(node.name)
            and not ast.get_docstring(node)
        ]
        assert not bare, (name, bare)


def test_torch_api_knows_nothing_of_ours() -> None:
    for name, tree in _modules_of_the_room():
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom):
                module = node.module or ""
                assert not node.level and (
                    not module.startswith("mst_fx") or module.startswith("mst_fx.torch_api")
                ), name
            elif isinstance(node, ast.Import):
                assert not any(alias.name.startswith("mst_fx") for alias in node.names), name
