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
# What stands for K and V has these too.
_KNOWN = {"shape", "dtype", "ndim", "astype"}


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
        if _UPDATE not in function.__code__.co_names:
            continue
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
        except (OSError, SyntaxError):
            continue
        found += _Uses(kind, function, tree).as_arrays()
    return tuple(found)


def _functions(kind: type) -> Iterator[FunctionType]:
    for base in kind.__mro__:
        for member in vars(base).values():
            if isinstance(member, FunctionType):
                yield member


class _Uses:
    """How a function uses what it gets from a cache."""

    def __init__(self, kind: type, function: FunctionType, tree: ast.AST):
        self.kind = kind
        self.globals = function.__globals__
        self.nodes = list(ast.walk(tree))
        self.parents = {
            child: node for node in self.nodes for child in ast.iter_child_nodes(node)
        }

    def as_arrays(self) -> Iterator[tuple[str, ...]]:
        """The attributes of ``self`` that each use as an array hangs on."""
        updates = [
            node
            for node in self.nodes
            if isinstance(node, ast.Assign) and _updates(node.value)
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
        for node in self.nodes:
            if not isinstance(node, ast.Name) or node.id not in names:
                continue
            later = isinstance(node.ctx, ast.Load) and node.lineno > first
            if later and node not in elsewhere and not self._is_harmless(node):
                yield tuple(self._conditions(node))

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

    def _is_harmless(self, name: ast.Name) -> bool:
        parent = self.parents[name]
        if isinstance(parent, ast.keyword):
            parent = self.parents[parent]
        if isinstance(parent, ast.Attribute):
            return parent.attr in _KNOWN
        if isinstance(parent, ast.Call):
            return _updates(parent) or self._attends(parent.func)
        # It is passed on, or looked at.
        return isinstance(
            parent, ast.Assign | ast.Tuple | ast.Return | ast.Compare | ast.IfExp
        )

    def _attends(self, called: ast.expr) -> bool:
        """Whether a function is attention, or a helper that calls it."""
        if isinstance(called, ast.Name):
            return called.id == ATTENTION or _calls(self.globals.get(called.id))
        if not isinstance(called, ast.Attribute):
            return False
        if ast.unparse(called.value) in ("mx", "mx.fast"):
            return False
        owners = [self.kind, *(x for x in self.globals.values() if inspect.isclass(x))]
        return called.attr == ATTENTION or any(
            _calls(getattr(owner, called.attr, None)) for owner in owners
        )


def _updates(node: ast.AST) -> bool:
    return (
        isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr == _UPDATE
    )


def _calls(function: Any) -> bool:
    code = getattr(function, "__code__", None)
    return code is not None and ATTENTION in code.co_names
