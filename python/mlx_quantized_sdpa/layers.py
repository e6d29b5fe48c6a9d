"""What the code of a model's layers does with K and V of its cache."""

import ast
import inspect
import textwrap
from collections.abc import Iterator
from functools import lru_cache
from types import FunctionType
from typing import Any

ATTENTION = "scaled_dot_product_attention"

_UPDATE = "update_and_fetch"
# How far helpers of helpers are followed.
_DEPTH = 4


def namespaces(kind: type) -> list[dict[str, Any]]:
    """The globals that the code of a class sees, wherever it was loaded from."""
    found = {id(f.__globals__): f.__globals__ for f in _functions(kind)}
    return list(found.values())


def needs_arrays(layer: Any) -> bool:
    """Whether a layer does more with K and V of its cache than attention to them.

    What stands for them is no array: no function of MLX takes it. Code that cannot be
    read is taken to do no more.
    """
    kind: Any = type(layer)
    return any(
        all(getattr(layer, condition, True) for condition in conditions)
        for conditions in _uses(kind)
    )


@lru_cache(maxsize=1024)
def _uses(kind: type) -> tuple[tuple[str, ...], ...]:
    """Of each use of K or V as an array, the attributes that it hangs on."""
    found: list[tuple[str, ...]] = []
    for function in _functions(kind):
        if _UPDATE in function.__code__.co_names:
            found += _read(kind, function, 0).from_cache()
    return tuple(found)


def _functions(kind: type) -> Iterator[FunctionType]:
    members: dict[str, Any] = {}
    for base in reversed(kind.__mro__):
        members |= vars(base)
    for member in members.values():
        if isinstance(member, FunctionType):
            yield member


def _read(kind: type, function: FunctionType, depth: int) -> "_Code":
    try:
        tree: ast.AST = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, SyntaxError):
        tree = ast.Module([], [])
    return _Code(kind, function.__globals__, tree, depth)


class _Code:
    """The code of a function of a layer, or of a helper that it calls."""

    def __init__(self, kind: type, names: dict[str, Any], tree: ast.AST, depth: int):
        self.kind = kind
        self.globals = names
        self.depth = depth
        self.nodes = list(ast.walk(tree))
        self.parents = {
            child: node for node in self.nodes for child in ast.iter_child_nodes(node)
        }

    def from_cache(self) -> list[tuple[str, ...]]:
        """Of each array needed of K or V, the attributes of self that it hangs on."""
        updates = [
            node
            for node in self.nodes
            if isinstance(node, ast.Assign) and _name(node.value) == _UPDATE
        ]
        names = {
            each.id
            for update in updates
            for target in update.targets
            for each in ast.walk(target)
            if isinstance(each, ast.Name)
        }
        first = min((update.lineno for update in updates), default=0)
        elsewhere = set(self._without_cache(updates))
        return [
            tuple(self._conditions(node))
            for node in self._arrays(names)
            if node.lineno > first and node not in elsewhere
        ]

    def _arrays(self, names: set[str]) -> Iterator[ast.Name]:
        """Where one of these must be an array."""
        for node in self.nodes:
            if isinstance(node, ast.Name) and node.id in names:
                if isinstance(node.ctx, ast.Load) and self._is_array(node):
                    yield node

    def _is_array(self, node: ast.AST) -> bool:
        parent = self.parents[node]
        if isinstance(parent, ast.keyword | ast.List):
            return self._is_array(parent)
        if isinstance(parent, ast.Call) and node is not parent.func:
            return self._takes_arrays(parent, node)
        return isinstance(parent, ast.BinOp)

    def _takes_arrays(self, call: ast.Call, argument: ast.AST) -> bool:
        """Whether what is called needs this argument to be an array."""
        name, owner = _name(call), ast.unparse(call.func).rpartition(".")[0]
        called = self._called(name, owner)
        if "mlx.core" in (_module(self.globals.get(owner.partition(".")[0])), owner):
            return True
        if name in (ATTENTION, _UPDATE) or self.depth == _DEPTH:
            return False
        if isinstance(called, FunctionType):
            code = _read(self.kind, called, self.depth + 1)
            own = list(inspect.signature(called).parameters)[owner != "" :]
            if isinstance(argument, ast.keyword):
                taken = {argument.arg or ""}
            else:
                taken = set(own[call.args.index(argument) :][:1])  # type: ignore[arg-type]
            return any(True for _ in code._arrays(taken))
        # Layers in this one, and compiled functions.
        return owner == "self" if called is None else _module(type(called)) == "mlx"

    def _called(self, name: str, owner: str) -> Any:
        """A function by its name, or a method of some class that the code knows."""
        if not owner:
            return self.globals.get(name, len)
        known = [x for x in self.globals.values() if inspect.isclass(x)]
        for kind in [self.kind] if owner == "self" else known:
            if (found := getattr(kind, name, None)) is not None:
                return found
        return None

    def _conditions(self, node: ast.AST) -> Iterator[str]:
        while (parent := self.parents.get(node)) is not None:
            if isinstance(parent, ast.If) and node in parent.body:
                test = parent.test
                if (
                    isinstance(test, ast.Attribute)
                    and ast.unparse(test.value) == "self"
                ):
                    yield test.attr
            node = parent

    def _without_cache(self, updates: list[ast.Assign]) -> Iterator[ast.AST]:
        """What runs instead of an update, where there is no cache."""
        for update in updates:
            node: ast.AST = update
            while (parent := self.parents.get(node)) is not None:
                if isinstance(parent, ast.If) and node in parent.body:
                    for other in parent.orelse:
                        yield from ast.walk(other)
                node = parent


def _name(node: ast.AST) -> str:
    """Of the function or method that is called."""
    return (
        ast.unparse(node.func).rpartition(".")[2] if isinstance(node, ast.Call) else ""
    )


def _module(x: Any) -> str:
    """The name of a module, or of the one that a class is from."""
    return getattr(x, "__module__" if inspect.isclass(x) else "__name__", "")
